/* The embedding module: what engine_module.h promises to engine.c, for one version of CPython. build_engine.py has cffi
 * write the up-calls around it, and the modules of the engine into frozen_modules.h. Everything here runs under the GIL
 * or takes it; nothing is called from a signal handler. */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>
#include "engine_module.h"
#include "frozen_modules.h"

CFFI_DLLEXPORT int interposer_configure(const void *, uint32_t, const struct process_facts *);
CFFI_DLLEXPORT int interposer_prepare(uint32_t);

static void (*write_log)(const char *line);

static void interposer_log(const char *line)
{
    write_log(line);
}

/* Importing _signal installs Python's SIGINT handler where the host has the default; this puts the host's back. */
static void interposer_keep_sigint(int begin)
{
    static struct sigaction host;
    sigaction(SIGINT, begin ? NULL : &host, begin ? &host : NULL);
}

/* Each up-call has a thread state of its own, and that a stack of this size: keeping one halves the up-call's cost. */
#define STACK_CHUNK 16384
static PyObjectArenaAllocator system_memory;
static void *spare_chunk;

static void *take_memory(void *context, size_t size)
{
    void *chunk = size == STACK_CHUNK ? __atomic_exchange_n(&spare_chunk, NULL, __ATOMIC_ACQ_REL) : NULL;
    return chunk ? chunk : system_memory.alloc(context, size);
}

static void give_memory(void *context, void *memory, size_t size)
{
    if (size == STACK_CHUNK)
        memory = __atomic_exchange_n(&spare_chunk, memory, __ATOMIC_ACQ_REL);
    if (memory)
        system_memory.free(context, memory, size);
}

static void keep_spare_chunk(void)
{
    PyObject_GetArenaAllocator(&system_memory);
    PyObjectArenaAllocator ours = {system_memory.ctx, take_memory, give_memory};
    PyObject_SetArenaAllocator(&ours);
}

/* A program that loads this very libpython for itself finds it started, and may end it. */
static bool gone;

static void python_ended(void)
{
    gone = true;
}

static int failed(const char *what)
{
    PyObject *type, *value, *traceback, *text = NULL;
    char line[512];
    PyErr_Fetch(&type, &value, &traceback);
    if (value)
        text = PyObject_Str(value);
    snprintf(line, sizeof line, "engine: %s: %s", what, text ? PyUnicode_AsUTF8(text) : "unknown error");
    write_log(line);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    PyErr_Clear();
    return -1;
}

static int failed_start(PyConfig *config, PyStatus status)
{
    char line[256];
    const char *why = status.err_msg ? status.err_msg : "it wants to exit";
    snprintf(line, sizeof line, "engine: Python does not start: %s", why);
    write_log(line);
    if (config)
        PyConfig_Clear(config);
    return -1;
}

static int import_and_forget(const char *name)
{
    PyObject *imported = PyImport_ImportModule(name);
    if (!imported)
        return failed(name);
    Py_DECREF(imported);
    return 0;
}

/* As `import _cffi_backend` would, but without reading the directories that come before its own in the search path. */
static int import_cffi(const struct engine_setup *setup)
{
    char file[4096];
    const char *const *path = setup->search_path;
    do
        snprintf(file, sizeof file, "%s/_cffi_backend" EXT_SUFFIX, *path);
    while (access(file, R_OK) && *++path);
    if (!*path)
        return import_and_forget("_cffi_backend");
    PyObject *machinery = PyImport_ImportModule("_frozen_importlib"), *module = NULL;
    PyObject *files = PyImport_ImportModule("_frozen_importlib_external");
    PyObject *spec = files ? PyObject_CallMethod(files, "spec_from_file_location", "ss", "_cffi_backend", file) : NULL;
    if (machinery && spec)
        module = PyObject_CallMethod(machinery, "_load", "O", spec);
    int result = module ? 0 : failed(file);
    Py_XDECREF(module);
    Py_XDECREF(spec);
    Py_XDECREF(files);
    Py_XDECREF(machinery);
    return result;
}

static int start_entry(void)
{
    int result = cffi_start_python();
    if (result) {
        /* cffi would tell the host's stderr why; here the log learns it, at a second try. */
        PyGILState_STATE gil = PyGILState_Ensure();
        import_and_forget("interposer.policy.entry");
        PyGILState_Release(gil);
    }
    return result;
}

static int start(const struct engine_setup *setup)
{
    static const char *const streams[] = {"stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"};
    PyPreConfig preconfig;
    PyConfig config;
    PyStatus status;
    write_log = setup->log;
    if (Py_Version >> 16 != PY_VERSION_HEX >> 16) {
        write_log("engine: libpython is not of the version for which the engine was built");
        return -1;
    }
    PyImport_FrozenModules = frozen_modules;
    PyPreConfig_InitIsolatedConfig(&preconfig);
    preconfig.utf8_mode = 1;
    preconfig.configure_locale = 0;
    preconfig.coerce_c_locale = 0;
    status = Py_PreInitialize(&preconfig);
    if (PyStatus_Exception(status))
        return failed_start(NULL, status);
    keep_spare_chunk();
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    config.install_signal_handlers = 0;
    config.write_bytecode = 0;
    config.pathconfig_warnings = 0;
    config.configure_c_stdio = 0;
    config.module_search_paths_set = 1;
    /* All that getpath.py would search for is given, so it touches no file. */
    wchar_t **paths[] = {&config.home, &config.prefix, &config.base_prefix, &config.exec_prefix,
                         &config.base_exec_prefix};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        status = PyConfig_SetBytesString(&config, paths[i], setup->home);
        if (PyStatus_Exception(status))
            return failed_start(&config, status);
    }
    char program[4096];
    snprintf(program, sizeof program, "%s/bin/python3", setup->home);
    wchar_t **programs[] = {&config.executable, &config.base_executable, &config.program_name};
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        status = PyConfig_SetBytesString(&config, programs[i], program);
        if (PyStatus_Exception(status))
            return failed_start(&config, status);
    }
    for (const char *const *path = setup->search_path; *path; path++) {
        wchar_t *wide = Py_DecodeLocale(*path, NULL);
        if (!wide)
            return failed_start(&config, PyStatus_NoMemory());
        status = PyWideStringList_Append(&config.module_search_paths, wide);
        PyMem_RawFree(wide);
        if (PyStatus_Exception(status))
            return failed_start(&config, status);
    }
    status = Py_InitializeFromConfig(&config);
    if (PyStatus_Exception(status))
        return failed_start(&config, status);
    PyConfig_Clear(&config);
    Py_AtExit(python_ended);
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        PySys_SetObject(streams[i], Py_None);
    int result = import_cffi(setup);
    PyEval_SaveThread();
    return result ? result : start_entry();
}

/* Questions go to Python by the plain C interface: cffi's way, structures included, costs 2 us more. These two are
 * looked up at each configuration; NULL or a callable. */
static PyObject *by_rules, *by_function;

static int look_up(PyObject *entry, const char *name, PyObject **place)
{
    PyObject *found = entry ? PyObject_GetAttrString(entry, name) : NULL;
    if (!found)
        return failed(name);
    Py_XSETREF(*place, found);
    return 0;
}

static int configure(const void *table, uint32_t size, const struct process_facts *facts)
{
    if (gone)
        return 0;
    PyGILState_STATE gil = PyGILState_Ensure();
    int result = interposer_configure(table, size, facts);
    if (result) {
        PyObject *entry = PyImport_ImportModule("interposer.policy.entry");
        if (look_up(entry, "decide_by_rules", &by_rules) || look_up(entry, "decide_by_function", &by_function))
            result = 0;
        Py_XDECREF(entry);
    }
    PyGILState_Release(gil);
    return result;
}

/* The thread that thread_begin was called on, and whether it has an exception coming that may be too late. */
static unsigned long function_thread;
static bool interrupted;

static void interrupt(bool (*due)(void))
{
    static PyObject *exception;
    if (gone)
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    if (!exception)
        exception = PyErr_NewException("interposer.FunctionTimeout", PyExc_BaseException, NULL);
    if (exception && function_thread && due())
        interrupted = PyThreadState_SetAsyncExc(function_thread, exception) > 0;
    PyErr_Clear();
    PyGILState_Release(gil);
}

static void forget_interrupt(void)
{
    if (interrupted && PyThread_get_thread_ident() == function_thread) {
        PyThreadState_SetAsyncExc(function_thread, NULL);
        interrupted = false;
    }
}

static int prepare(uint32_t function)
{
    if (gone)
        return 0;
    PyGILState_STATE gil = PyGILState_Ensure();
    forget_interrupt();
    int result = interposer_prepare(function);
    PyGILState_Release(gil);
    return result;
}

/* Field `i` of an answer as a number of at most 32 bits; 0 with an exception set where it is none. */
static uint32_t field(PyObject *answer, Py_ssize_t i)
{
    unsigned long value = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(answer, i));
    return (uint32_t)value;
}

static int take_answer(PyObject *answer, const struct decision_request *request, struct verdict *out)
{
    bool ruled = request->function == FUNCTION_NONE;
    if (!PyTuple_Check(answer) || PyTuple_GET_SIZE(answer) != (ruled ? 6 : 7))
        return -1;
    PyObject *providers = PyTuple_GET_ITEM(answer, 2);
    if (!PyTuple_Check(providers) || PyTuple_GET_SIZE(providers) > PROVIDERS_MAX)
        return -1;
    *out = (struct verdict){.action = (uint8_t)field(answer, 0), .otherwise = (uint8_t)field(answer, 1),
                            .reason = (uint16_t)field(answer, 3), .rule = request->rule, .function = FUNCTION_NONE};
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(providers); i++)
        out->providers[i] = (uint8_t)field(providers, i);
    if (ruled) {
        out->rule = field(answer, 4);
        out->function = out->action == ACTION_ASK ? field(answer, 5) : FUNCTION_NONE;
    } else {
        out->send_buffer = field(answer, 4);
        out->receive_buffer = field(answer, 5);
        out->remember_ms = field(answer, 6);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *bytes_of(const void *data, size_t size)
{
    return PyBytes_FromStringAndSize(data, (Py_ssize_t)size);
}

static PyObject *question(const struct decision_request *request)
{
    PyObject *words[9] = {
        PyLong_FromUnsignedLong(request->function),
        PyLong_FromUnsignedLong(request->rule),
        PyLong_FromLong(request->role),
        PyLong_FromLong(request->family),
        bytes_of(request->local.ip, sizeof request->local.ip),
        PyLong_FromLong(request->local.port),
        bytes_of(request->remote.ip, sizeof request->remote.ip),
        PyLong_FromLong(request->remote.port),
        bytes_of(request->options, request->noptions * sizeof *request->options),
    };
    PyObject *result = NULL;
    size_t made = 0;
    while (made < 9 && words[made])
        made++;
    if (made == 9)
        result = request->function == FUNCTION_NONE ? PyObject_Vectorcall(by_rules, words + 2, 6, NULL)
                                                    : PyObject_Vectorcall(by_function, words, 9, NULL);
    for (size_t i = 0; i < 9; i++)
        Py_XDECREF(words[i]);
    return result;
}

/* The thread state is made here and not by cffi, which would free it from a destructor of the host's thread: a fork in
 * that moment leaves cffi's lock held in the child. */
static int decide(const struct decision_request *request, struct verdict *out)
{
    if (gone)
        return 0;
    PyGILState_STATE gil = PyGILState_Ensure();
    forget_interrupt();
    PyObject *answer = question(request);
    int result = answer ? take_answer(answer, request, out) : -1;
    Py_XDECREF(answer);
    if (result)
        failed("decide");
    PyGILState_Release(gil);
    return result == 0;
}

static void *thread_begin(void)
{
    if (gone)
        return NULL;
    PyGILState_Ensure();
    function_thread = PyThread_get_thread_ident();
    return PyEval_SaveThread();
}

static void thread_end(void *state)
{
    if (gone || !state)
        return;
    PyEval_RestoreThread(state);
    if (function_thread == PyThread_get_thread_ident())
        function_thread = 0;           /* else its successor has begun already */
    PyGILState_Release(PyGILState_UNLOCKED);
}

static PyGILState_STATE fork_gil;
static bool forking;

static void before_fork(void)
{
    forking = !gone;
    if (!forking)
        return;
    fork_gil = PyGILState_Ensure();
    PyOS_BeforeFork();
}

static void after_fork_parent(void)
{
    if (!forking)
        return;
    PyOS_AfterFork_Parent();
    PyGILState_Release(fork_gil);
}

static void after_fork_child(void)
{
    if (!forking)
        return;
    PyOS_AfterFork_Child();
    function_thread = 0;
    interrupted = false;
    /* An interpreter must never lose its last thread state, and this thread's own goes with the next line. */
    PyThreadState_New(PyInterpreterState_Get());
    PyGILState_Release(fork_gil);
}

__attribute__((visibility("default"))) const struct engine_module engine_module = {
    ENGINE_MODULE_VERSION, start, configure, prepare, decide, thread_begin, thread_end,
    interrupt, before_fork, after_fork_parent, after_fork_child,
};
