/* X4, X3: the compiled policy, from the file to the verdict, with a reload in the middle, and what an engine or helper may
 * answer. An input is 64 bytes of questions and answers, then the file; the mutator mends size and checksum, else hardly
 * anything would pass them. */
#include "fuzz.h"
#define stat(path, status) fuzz_stat(status)
#define fstat(fd, status) fuzz_stat(status)
static int fuzz_stat(struct stat *status);
#include "interposer/native/policy_table.c"
#include "interposer/native/predicates.c"
#include "interposer/native/rule_index.c"
#include "interposer/native/flows.c"
#undef stat
#undef fstat

#define QUESTIONS 64

static struct fuzz_input answers;
static size_t file_size;
static uint64_t changes;

static int fuzz_stat(struct stat *status)
{
    *status = (struct stat){.st_mode = S_IFREG | 0644, .st_uid = geteuid(), .st_size = (off_t)file_size,
                            .st_ino = ++changes};
    return 0;
}

void engine_ask(const void *table, const struct decision_request *request, struct verdict *out)
{
    const struct table_header *header = table;
    check(request->noptions <= SOCK_OPTIONS);
    check(request->function == FUNCTION_NONE || request->function < header->nfunctions);
    check(request->rule == RULE_DEFAULT || request->rule < header->nrules);
    fuzz_take(&answers, out, sizeof *out);
}

static const struct process_facts facts = {"/usr/bin/redis-server", "redis", "redis-server\0--port\0007000\0", "HOME=/root\0A=b\0",
                                           "/user.slice\0", 0};

static void question(struct fuzz_input *in)
{
    struct endpoint local, remote;
    struct verdict verdict;
    struct sock_option option = {1, 2, 4, {1}};
    char text[64];
    uint8_t mode = fuzz_byte(in);
    fuzz_take(in, &local, 18);
    fuzz_take(in, &remote, 18);
    local.scope = remote.scope = 0;
    if (mode & 1)
        endpoint_set_wildcard(&local, mode & 2);
    if (mode & 4)
        memcpy(remote.ip, "\0\0\0\0\0\0\0\0\0\0\xff\xff", 12);
    flows_decide(mode & 8 ? ROLE_LISTEN : ROLE_CONNECT, mode & 4 ? AF_INET : AF_INET6, &local, &remote, &option,
                 mode & 16 ? 1 : 0, &verdict);
    check(verdict.action == ACTION_TCP || verdict.action == ACTION_SAN);
    check(verdict.otherwise == OTHERWISE_TCP || verdict.otherwise == OTHERWISE_ERROR);
    check(verdict.action == ACTION_TCP || verdict.providers[0]);
    check(flows_rule_text(verdict.rule, text, mode >> 2) < sizeof text);
}

static void forget_all(void)
{
    struct policy_table *table = atomic_exchange(&current, NULL);
    if (table)
        free_table(table);
    for (unsigned i = 0; i < RETIRED; i++)
        if ((table = atomic_exchange(&retired[i], NULL)))
            free_table(table);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + (size < QUESTIONS ? size : QUESTIONS)};
    const uint8_t *file = in.end;
    fuzz_files();
    answers = in;
    file_size = (size_t)(data + size - file);
    fuzz_serve(file, file_size, 0);
    flows_load("/nowhere", &facts);
    flows_strict();
    flows_engine();
    question(&in);
    fuzz_serve(file, file_size, 0);    /* the file changes */
    atomic_store(&next_check, 0);
    question(&in);
    question(&in);
    forget_all();
    return 0;
}

static void mend(uint8_t *file, size_t size)
{
    struct table_header header;
    if (size < sizeof header)
        return;
    memcpy(&header, file, sizeof header);
    memcpy(header.magic, TABLE_MAGIC, sizeof header.magic);
    header.version = TABLE_VERSION;
    header.size = (uint32_t)size;
    header.crc = crc32_of(file + sizeof header, size - sizeof header);
    memcpy(file, &header, sizeof header);
}

/* A field of the header or of a record is made another one, or a number near a bound. */
static void change_field(uint8_t *file, size_t size, unsigned seed)
{
    static const uint32_t numbers[] = {0, 1, 2, 3, 127, 128, 129, 255, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffe};
    size_t words = size / 4, first = 0, count = words;
    struct table_header header;
    if (size < sizeof header)
        return;
    memcpy(&header, file, sizeof header);
    switch (seed % 8) {
    case 0: break;
    case 1: count = sizeof header / 4; break;
    case 2: first = header.functions / 4; count = header.nfunctions * (sizeof(struct table_function) / 4); break;
    case 3: first = header.predicates / 4; count = header.npredicates * (sizeof(struct table_predicate) / 4); break;
    case 4: first = header.sections / 4; count = header.nsections * (sizeof(struct table_section) / 4); break;
    default: first = header.rules / 4; count = header.nrules * (sizeof(struct table_rule) / 4);
    }
    if (first >= words || !count || count > words - first) {
        first = 0;
        count = words;
    }
    seed /= 8;
    size_t at = first + seed / 16 % count;
    uint32_t value, other;
    memcpy(&value, file + at * 4, 4);
    memcpy(&other, file + (seed / 977 % words) * 4, 4);
    switch (seed % 5) {
    case 0: value = numbers[seed / 64 % (sizeof numbers / sizeof *numbers)]; break;
    case 1: value++; break;
    case 2: value--; break;
    case 3: value = other; break;
    default: value = (uint32_t)size - seed / 32 % 80;
    }
    memcpy(file + at * 4, &value, 4);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    seed = seed * 2654435761u >> 3;
    if (size > QUESTIONS && seed % 2)
        change_field(data + QUESTIONS, size - QUESTIONS, seed / 2);
    else
        size = LLVMFuzzerMutate(data, size, room);
    if (size > QUESTIONS && seed % 19)
        mend(data + QUESTIONS, size - QUESTIONS);
    return size;
}
