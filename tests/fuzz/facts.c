/* X4, P3: name, arguments, cgroups and environment of the process, and the predicates that look at them. An input is the
 * environment, the predicate's text, and what stands in the files of /proc, all ended by a 0xff. */
#include "fuzz.h"
#include "interposer/native/predicates.c"
#include "interposer/native/lifecycle.c"

static char *next_part(struct fuzz_input *in, size_t *size)
{
    const uint8_t *end = in->at < in->end ? memchr(in->at, 0xff, (size_t)(in->end - in->at)) : NULL;
    end = end ? end : in->end;
    *size = (size_t)(end - in->at);
    char *part = malloc(*size + 1);
    if (*size)
        memcpy(part, in->at, *size);
    part[*size] = 0;
    in->at = end < in->end ? end + 1 : end;
    return part;
}

static size_t measure(const char *list)
{
    const char *at = list;
    while (*at)
        at += strlen(at) + 1;
    return (size_t)(at - list);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + size};
    char *own[64], **saved = environ;
    size_t length, text_length, count = 0;
    fuzz_files();
    char *block = next_part(&in, &length), *text = next_part(&in, &text_length);
    for (char *at = block; at < block + length && count < 63; at += strlen(at) + 1)
        own[count++] = at;
    own[count] = NULL;
    fuzz_serve(in.at, (size_t)(in.end - in.at), 1 + text_length);
    environ = own;
    keep_facts();
    environ = saved;
    check(measure(facts.environment) <= length + 1);
    measure(facts.arguments);
    measure(facts.cgroups);
    for (uint32_t kind = PREDICATE_EXE; kind <= PREDICATE_ENV + 1; kind++) {
        struct table_predicate predicate = {.kind = kind};
        predicate_holds(&predicate, text, &facts);
    }
    free((void *)facts.exe);           /* the first of them: where the memory begins */
    free(block);
    free(text);
    return 0;
}
