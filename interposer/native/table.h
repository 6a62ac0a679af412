/* The compiled policy: what interposer/config/compile.py writes and flows.c reads. All integers are in the machine's
 * byte order, all offsets are from the start of the file, every string is UTF-8 and NUL-terminated inside the string
 * area, whose offset 0 is the empty string. Reader and writer are held together by tests/unit/test_layout.py. */
#ifndef INTERPOSER_TABLE_H
#define INTERPOSER_TABLE_H
#include <stdint.h>

#define TABLE_MAGIC "SANTABLE"
#define TABLE_VERSION 1
#define TABLE_MAX_SIZE (16u << 20)
#define TIMEOUT_MS_MAX 10000u

enum { ROLE_LISTEN = 1, ROLE_CONNECT = 2 };                       /* bits */
enum { FAMILY_V4 = 1, FAMILY_V6 = 2 };                            /* bits */
enum { ACTION_TCP = 1, ACTION_SAN = 2, ACTION_ASK = 3 };
enum { OTHERWISE_INHERIT = 0, OTHERWISE_TCP = 1, OTHERWISE_ERROR = 2 };
enum { ENGINE_INHERIT = 0, ENGINE_EMBEDDED = 1, ENGINE_STARTUP = 2, ENGINE_HELPER = 3, ENGINE_REACTIVE = 4, ENGINE_OFF = 5 };
enum { FIREWALL_INHERIT = 0, FIREWALL_HEED = 1, FIREWALL_IGNORE = 2 };
enum { PREDICATE_EXE = 1, PREDICATE_NAME = 2, PREDICATE_ARG = 3, PREDICATE_USER = 4, PREDICATE_CGROUP = 5, PREDICATE_ENV = 6 };
enum { PROVIDER_NONE = 0, PROVIDER_UNIX = 1 };
#define PROVIDERS_MAX 4

struct table_header {
    char magic[8];
    uint32_t version, size;      /* size: bytes of the whole file */
    uint32_t crc, flags;         /* crc: CRC-32 (zlib's) of all bytes after this header; flags: 0 */
    uint64_t generation;         /* nanoseconds since 1970 when it was compiled */
    uint32_t sections, nsections;       /* struct table_section; the last is the global scope and has no predicates */
    uint32_t predicates, npredicates;   /* struct table_predicate */
    uint32_t rules, nrules;             /* struct table_rule */
    uint32_t functions, nfunctions;     /* struct table_function */
    uint32_t strings, strings_size;
    uint32_t search_path, nsearch_path; /* uint32_t string offsets: sys.path of the engine */
    uint32_t libpython, python_home;    /* strings: the library to load; the prefix that holds lib/python3.X */
    uint32_t engine_module;             /* string: absolute path of the cffi module */
    uint32_t helper;                    /* string: address of the helper process's socket, or "" */
    uint32_t key;                       /* string: the launcher's cache key */
    uint32_t reserved;
};

/* A [[process]] section, or (the last) the global scope. It applies when all of its predicates hold. The predicates and
 * the rules of a section begin where those of the one before it end. The rules of the sections that apply are tried in
 * order, the global scope's last. Of `engine`, `otherwise`, `providers` and `firewall` the first applying section that sets one
 * wins; the global scope carries [defaults] and sets all of them. */
struct table_section {
    uint32_t predicate, npredicates;
    uint32_t rule, nrules;
    uint32_t file, line;                /* where it stands; file: a string */
    uint8_t engine, otherwise;
    uint8_t providers[PROVIDERS_MAX];   /* in order, ended by PROVIDER_NONE */
    uint8_t firewall;                   /* FIREWALL_* */
    uint8_t reserved;
};

/* Globs know `*` (any bytes) and `?` (one byte), nothing else. EXE is compared with the path of /proc/self/exe when the
 * glob has a '/', else with its last part; NAME with /proc/self/comm; ARG with each argument after the first; CGROUP
 * with each path in /proc/self/cgroup; ENV is NAME=glob, or NAME, which wants only that it is set; USER compares
 * `number` with the effective user id at start. */
struct table_predicate {
    uint32_t kind, text, number, reserved;
};

/* Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d; `prefix` counts bits of those 16 bytes. A rule matches when role,
 * families, both addresses and both ports match; the families bits are tested against each address's own family. */
struct table_rule {
    uint8_t role, action, otherwise, reserved;
    uint8_t providers[PROVIDERS_MAX];   /* ACTION_SAN: all zero means the section's or the defaults' */
    uint8_t local_families, local_prefix, remote_families, remote_prefix;
    uint16_t local_port[2], remote_port[2];   /* first and last */
    uint8_t local[16], remote[16];
    uint32_t function;                  /* index, for ACTION_ASK */
    uint32_t file, line;                /* where it stands */
};

struct table_function {
    uint32_t module, name;              /* strings */
    uint32_t timeout_ms, reserved;      /* 1 to TIMEOUT_MS_MAX */
    uint32_t file, line;
};
#endif
