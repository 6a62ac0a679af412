/* awkward_filters SEED COUNT: random system call filters, each judged by interposer/native/sandbox.c and by the kernel: a
 * child installs it and makes one call. Prints how many were judged, and those that were judged differently. */
#include "awkward.h"
#include "../../interposer/native/sandbox.c"
#include <sys/prctl.h>

#define STEPS 40
#define SLOTS 4
#define ERRORS 100                     /* the children tell what they saw by their exit status */

static struct sock_filter filter[STEPS + 20];
static unsigned short count;

static uint32_t number(void)
{
    static const uint32_t telling[] = {0, 1, 2, 31, 32, 0x7fffffff, 0x80000000, 0xffffffff};
    return rand() % 3 ? telling[(unsigned)rand() % (sizeof telling / sizeof *telling)] : (uint32_t)rand() * 3u;
}

static void add(unsigned code, uint32_t k, uint8_t jt, uint8_t jf)
{
    filter[count++] = (struct sock_filter){(uint16_t)code, jt, jf, k};
}

static void random_step(unsigned left)
{
    static const unsigned operations[] = {BPF_ADD, BPF_SUB, BPF_MUL, BPF_DIV, BPF_AND, BPF_OR, BPF_XOR, BPF_LSH, BPF_RSH, BPF_NEG};
    static const unsigned jumps_of[] = {BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET};
    unsigned slot = (unsigned)rand() % SLOTS, source = rand() % 2 ? BPF_K : BPF_X, operation;
    uint32_t k = number();
    switch (rand() % 9) {
    case 0:
    case 1: add(BPF_LD | BPF_W | BPF_ABS, (uint32_t)rand() % (sizeof(struct seccomp_data) / 4) * 4, 0, 0); break;
    case 2:
        operation = operations[(unsigned)rand() % 10];
        if (operation == BPF_DIV && source == BPF_K && !k)
            k = 7;
        if ((operation == BPF_LSH || operation == BPF_RSH) && source == BPF_K)
            k %= 32;
        add(BPF_ALU | operation | (operation == BPF_NEG ? 0 : source), k, 0, 0);
        break;
    case 3: add(BPF_MISC | (rand() % 2 ? BPF_TAX : BPF_TXA), 0, 0, 0); break;
    case 4: add((rand() % 2 ? BPF_LD : BPF_LDX) | (rand() % 2 ? BPF_IMM : BPF_W | BPF_LEN), k, 0, 0); break;
    case 5: add(rand() % 2 ? BPF_ST : BPF_STX, slot, 0, 0); break;
    case 6: add((rand() % 2 ? BPF_LD : BPF_LDX) | BPF_MEM, slot, 0, 0); break;
    case 7:
        add(BPF_JMP | jumps_of[rand() % 4] | source, k, (uint8_t)((unsigned)rand() % (left < 4 ? left : 4)),
            (uint8_t)((unsigned)rand() % (left < 4 ? left : 4)));
        break;
    default:
        if (rand() % 4 == 0)
            add(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (1 + (uint32_t)rand() % ERRORS), 0, 0);
    }
}

/* All jumps end before the last steps, which return an error that depends on the accumulator. */
static void make_filter(void)
{
    count = 0;
    add(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
    add(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1);
    add(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
    add(BPF_LDX | BPF_IMM, number(), 0, 0);
    for (unsigned slot = 0; slot < SLOTS; slot++)   /* the kernel wants a store on every way to a load */
        add(rand() % 2 ? BPF_ST : BPF_STX, slot, 0, 0);
    for (unsigned left = STEPS; left > 0; left--)
        random_step(left);
    for (int i = 0; i < 4; i++)        /* as many as a jump can pass over */
        add(BPF_ALU | BPF_AND | BPF_K, 63, 0, 0);
    add(BPF_ALU | BPF_OR | BPF_K, SECCOMP_RET_ERRNO | 64, 0, 0);
    add(BPF_RET | BPF_A, 0, 0, 0);
}

static int kernels_answer(const struct sock_fprog *program, const struct seccomp_data *data)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(10);
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program) < 0)
            _exit(200);
        const uint64_t *words = (const uint64_t *)data->args;
        long result = past_libc(data->nr, (long)words[0], (long)words[1], (long)words[2], (long)words[3], (long)words[4]);
        past_libc(SYS_exit_group, result < 0 && result > -128 ? -result : 201, 0, 0, 0, 0);
    }
    return ended_within(child, 10);
}

int main(int argc, char **argv)
{
    int judged = 0, refused = 0, wanted = argc > 2 ? atoi(argv[2]) : 0;
    srand((unsigned)atoi(argv[1]));
    while (judged < wanted) {
        struct sock_fprog program;
        struct seccomp_data data = {.nr = 4000 + rand() % 100, .arch = ARCHITECTURE};   /* no such calls */
        make_filter();
        program = (struct sock_fprog){count, filter};
        for (int i = 0; i < 5; i++)
            data.args[i] = (uint64_t)number() << 32 | number();
        bool looks_elsewhere = false;  /* at what the child cannot choose: the sixth argument, where the call stands */
        for (int i = 0; i < count; i++)
            looks_elsewhere |= filter[i].code == (BPF_LD | BPF_W | BPF_ABS) &&
                               ((filter[i].k >= offsetof(struct seccomp_data, instruction_pointer) &&
                                 filter[i].k < offsetof(struct seccomp_data, args)) ||
                                filter[i].k >= offsetof(struct seccomp_data, args[5]));
        if (looks_elsewhere)
            continue;
        int kernel = kernels_answer(&program, &data);
        uint32_t action = answer(&program, &data);
        int ours = action == SECCOMP_RET_KILL_THREAD ? -SIGSYS : (int)(action & SECCOMP_RET_DATA);
        if (kernel == 200) {
            refused++;
            if (refused > wanted)
                return 3;
            continue;
        }
        judged++;
        if (kernel != ours)
            SAY("filter %d: the kernel says %d, we say %d\n", judged, kernel, ours);
    }
    SAY("%d judged\n", judged);
    return 0;
}
