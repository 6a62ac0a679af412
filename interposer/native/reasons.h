/* The constants of reasons.def. */
#ifndef INTERPOSER_REASONS_H
#define INTERPOSER_REASONS_H
enum reason {
    REASON_NONE = 0,
#define REASON(number, symbol, sentence, hint) REASON_##symbol = number,
#include "reasons.def"
#undef REASON
};
#endif
