/* Pure functions on the facts of a process; no state. May run anywhere. */
#include "predicates.h"
#include <string.h>

static bool glob_matches(const char *pattern, const char *pattern_end, const char *text, const char *text_end)
{
    const char *star = NULL, *mark = NULL;

    while (text < text_end) {
        if (pattern < pattern_end && *pattern == '*') {
            star = pattern++;
            mark = text;
        } else if (pattern < pattern_end && (*pattern == '?' || *pattern == *text)) {
            pattern++;
            text++;
        } else if (star) {
            pattern = star + 1;
            text = ++mark;
        } else {
            return false;
        }
    }
    while (pattern < pattern_end && *pattern == '*')
        pattern++;
    return pattern == pattern_end;
}

static bool glob_string(const char *pattern, const char *text)
{
    return glob_matches(pattern, pattern + strlen(pattern), text, text + strlen(text));
}

static bool any_matches(const char *pattern, const char *list)
{
    for (; *list; list += strlen(list) + 1)
        if (glob_string(pattern, list))
            return true;
    return false;
}

static bool environment_matches(const char *text, const char *list)
{
    const char *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : strlen(text);

    for (; *list; list += strlen(list) + 1) {
        const char *value = strchr(list, '=');
        size_t name = value ? (size_t)(value - list) : strlen(list);
        if (name == length && memcmp(list, text, length) == 0)
            return !equals || glob_string(equals + 1, value ? value + 1 : "");
    }
    return false;
}

static const char *or_empty(const char *list)
{
    return list ? list : "";
}

bool predicate_holds(const struct table_predicate *predicate, const char *text, const struct process_facts *facts)
{
    const char *subject;

    switch (predicate->kind) {
    case PREDICATE_EXE:
        subject = or_empty(facts->exe);
        if (!strchr(text, '/') && strrchr(subject, '/'))
            subject = strrchr(subject, '/') + 1;
        return glob_string(text, subject);
    case PREDICATE_NAME:
        return glob_string(text, or_empty(facts->name));
    case PREDICATE_ARG:
        subject = or_empty(facts->arguments);
        return *subject && any_matches(text, subject + strlen(subject) + 1);
    case PREDICATE_USER:
        return facts->user == predicate->number;
    case PREDICATE_CGROUP:
        return any_matches(text, or_empty(facts->cgroups));
    case PREDICATE_ENV:
        return environment_matches(text, or_empty(facts->environment));
    default:
        return false;
    }
}
