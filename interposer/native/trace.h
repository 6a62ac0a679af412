/* One line of log for each event that a person may have to look into, to the file of INTERPOSER_LOG only. */
#ifndef INTERPOSER_TRACE_H
#define INTERPOSER_TRACE_H
void trace_open(const char *path);
void trace_line(const char *line); /* of any length, by malloc() */
void trace_log(const char *format, ...) __attribute__((format(printf, 1, 2))); /* cut at 511 bytes */
#endif
