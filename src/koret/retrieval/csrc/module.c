/* Compiled kernels for koret.retrieval.compiled, which chooses, checks what it passes, and says what is computed. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#include "kernel.h"

#define VERSION 4 /* compiled.py asks for this one: raise both whenever a call or a result changes */

static const Kernel *const kernels[] = {
#ifdef KORET_HAS_KERNELS
    &koret_bfloat16_avx512,
    &koret_float32_avx512,
    &koret_float32_avx2,
#endif
    NULL,
};

PyDoc_STRVAR(list_kernels_doc, "list_kernels() -> [str]\n\nNames of the kernels that this processor can run, best first.");

static PyObject *
list_kernels(PyObject *module, PyObject *unused)
{
    PyObject *names = PyList_New(0);
    for (int i = 0; names && kernels[i]; i++) {
        if (!kernels[i]->is_supported())
            continue;
        PyObject *name = PyUnicode_FromString(kernels[i]->name);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* 0, or -1 where there is no memory. Units are dealt out a few at a time: texts differ in length, so that every thread
 * should come back often, but while a unit is worked on the next one is already asked for from memory, and the heads of
 * one text share the pages that they lie on. */
static int
run_units(const Kernel *kernel, const Task *task, int threads)
{
    const long share = task->units / (8 * (long)threads);
    const long chunk = share < 1 ? 1 : share < task->heads ? share : task->heads;
    const size_t bytes = (kernel->count_bytes(task) + 63) / 64 * 64;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        void *memory = aligned_alloc(64, bytes);
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, chunk)
        for (long unit = 0; unit < task->units; unit++)
            if (memory)
                kernel->run(task, unit, memory);
        free(memory);
    }
    return failed ? -1 : 0;
}

/* The kernel of this name, or NULL with an exception set. */
static const Kernel *
find_kernel(const char *name)
{
    for (int i = 0; kernels[i]; i++)
        if (!strcmp(kernels[i]->name, name) && kernels[i]->is_supported())
            return kernels[i];
    PyErr_Format(PyExc_ValueError, "this processor has no kernel '%s'", name);
    return NULL;
}

PyDoc_STRVAR(attend_doc,
"attend(kernel, qkv, gradient, result, bounds, tokens, texts, longest, heads, size, threads) -> bool\n\n"
"Attention within each text, by the kernel of this name. The next four are addresses: see Task in kernel.h. False, and\n"
"nothing is computed, where the bounds are not those of texts of at most longest of so many tokens.\n"
"Raises ValueError for a kernel there is not, MemoryError.");

static PyObject *
attend(PyObject *module, PyObject *args)
{
    const char *name;
    unsigned long long qkv, gradient, result, bounds;
    long tokens, texts, longest, heads, size;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKKllllli", &name, &qkv, &gradient, &result, &bounds, &tokens, &texts, &longest,
                          &heads, &size, &threads))
        return NULL;
    const Kernel *kernel = find_kernel(name);
    if (!kernel)
        return NULL;
    const Task task = {
        .qkv = (const void *)(uintptr_t)qkv,
        .gradient = (const void *)(uintptr_t)gradient,
        .result = (void *)(uintptr_t)result,
        .bounds = (const int *)(uintptr_t)bounds,
        .heads = heads,
        .size = size,
        .longest = longest,
        .units = texts * heads,
    };
    if (task.bounds[0] < 0 || task.bounds[texts] > tokens)
        Py_RETURN_FALSE;
    for (long text = 0; text < texts; text++)
        if (task.bounds[text + 1] < task.bounds[text] || task.bounds[text + 1] - task.bounds[text] > longest)
            Py_RETURN_FALSE;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_units(kernel, &task, threads);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_TRUE;
}

enum { PIECE = 4096 }; /* numbers that a thread takes at a time: a multiple of dropout's places */

/* A pass over numbers, the one that is kept `place` bytes behind the start of a Kernel. */
static PyObject *
run_pass(PyObject *args, size_t place)
{
    const char *name;
    unsigned long long x, y, kept, seed = 0;
    unsigned int least = 0;
    float factor = 1;
    long count;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKli|KIf", &name, &x, &y, &kept, &count, &threads, &seed, &least, &factor))
        return NULL;
    const Kernel *kernel = find_kernel(name);
    if (!kernel)
        return NULL;
    Pass *const pass = *(Pass *const *)((const char *)kernel + place);
    const Numbers numbers = {
        .x = (void *)(uintptr_t)x,
        .y = (void *)(uintptr_t)y,
        .kept = (void *)(uintptr_t)kept,
        .seed = seed,
        .least = least,
        .factor = factor,
    };
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long at = 0; at < count; at += PIECE)
        pass(&numbers, at, count - at < PIECE ? count - at : PIECE);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(activate_doc,
"activate(kernel, x, y, slopes, count, threads)\n\n"
"GELU of count numbers at the address x to y, which may be the same, and its slopes to the address slopes.\n"
"Raises ValueError for a kernel there is not.");

static PyObject *
activate(PyObject *module, PyObject *args)
{
    return run_pass(args, offsetof(Kernel, activate));
}

PyDoc_STRVAR(descend_doc,
"descend(kernel, x, y, slopes, count, threads)\n\n"
"Products of count numbers at the address x and the slopes that activate wrote, to y.\n"
"Raises ValueError for a kernel there is not.");

static PyObject *
descend(PyObject *module, PyObject *args)
{
    return run_pass(args, offsetof(Kernel, descend));
}

PyDoc_STRVAR(draw_doc,
"draw(kernel, 0, 0, kept, count, threads, seed, least)\n\n"
"For each of count places whether its draw, of 0 to 65535 by seed and place, is at least least: a bit at the address\n"
"kept, where there is memory for a multiple of 128 of them. Raises ValueError for a kernel there is not.");

static PyObject *
draw(PyObject *module, PyObject *args)
{
    return run_pass(args, offsetof(Kernel, draw));
}

PyDoc_STRVAR(drop_doc,
"drop(kernel, x, y, kept, count, threads, 0, 0, factor)\n\n"
"Each of count numbers at the address x times factor, or 0 where its bit, of those that draw wrote, is not set: to y,\n"
"which may be the same. Raises ValueError for a kernel there is not.");

static PyObject *
drop(PyObject *module, PyObject *args)
{
    return run_pass(args, offsetof(Kernel, drop));
}

enum { SOME_ROWS = 16 }; /* that a thread takes at a time */

/* A pass over rows, the one that is kept `place` bytes behind the start of a Kernel. */
static PyObject *
run_rows(PyObject *args, size_t place)
{
    const char *name;
    unsigned long long x, other, total, y, statistics, weight, bias, added[2];
    long count, width;
    float epsilon;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKKKKKKKllfi", &name, &x, &other, &total, &y, &statistics, &weight, &bias, &added[0],
                          &added[1], &count, &width, &epsilon, &threads))
        return NULL;
    const Kernel *kernel = find_kernel(name);
    if (!kernel)
        return NULL;
    RowPass *const pass = *(RowPass *const *)((const char *)kernel + place);
    const Rows rows = {
        .x = (const void *)(uintptr_t)x,
        .other = (const void *)(uintptr_t)other,
        .total = (void *)(uintptr_t)total,
        .y = (void *)(uintptr_t)y,
        .statistics = (float *)(uintptr_t)statistics,
        .weight = (const float *)(uintptr_t)weight,
        .bias = (const float *)(uintptr_t)bias,
        .added = {(const void *)(uintptr_t)added[0], (const void *)(uintptr_t)added[1]},
        .width = width,
        .epsilon = epsilon,
    };
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long at = 0; at < count; at += SOME_ROWS)
        pass(&rows, at, count - at < SOME_ROWS ? count - at : SOME_ROWS);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(normalize_doc,
"normalize(kernel, x, other, total, y, statistics, weight, bias, 0, 0, rows, width, epsilon, threads)\n\n"
"The norm of rows at the address x, to y, and their statistics. Where there is another, to total the sum, whose norm it\n"
"is. epsilon less than 0: the statistics are given. Raises ValueError for a kernel there is not.");

static PyObject *
normalize(PyObject *module, PyObject *args)
{
    return run_rows(args, offsetof(Kernel, normalize));
}

PyDoc_STRVAR(descend_norm_doc,
"descend_norm(kernel, x, 0, total, y, statistics, weight, 0, added, added, rows, width, 0, threads)\n\n"
"From gradients of the norm, whose sum counts, those of total: to y, which may be x. Without weight no norm is taken\n"
"back: y is the sum. Raises ValueError for a kernel there is not.");

static PyObject *
descend_norm(PyObject *module, PyObject *args)
{
    return run_rows(args, offsetof(Kernel, descend_norm));
}

PyDoc_STRVAR(count_slope_bytes_doc,
"count_slope_bytes(kernel) -> int\n\nBytes in which the kernel of this name keeps one slope.\n"
"Raises ValueError for a kernel there is not.");

static PyObject *
count_slope_bytes(PyObject *module, PyObject *name)
{
    const char *text = PyUnicode_AsUTF8(name);
    const Kernel *kernel = text ? find_kernel(text) : NULL;
    return kernel ? PyLong_FromSize_t(kernel->slope_bytes) : NULL;
}

static PyMethodDef methods[] = {
    {"list_kernels", list_kernels, METH_NOARGS, list_kernels_doc},
    {"attend", attend, METH_VARARGS, attend_doc},
    {"count_slope_bytes", count_slope_bytes, METH_O, count_slope_bytes_doc},
    {"activate", activate, METH_VARARGS, activate_doc},
    {"descend", descend, METH_VARARGS, descend_doc},
    {"draw", draw, METH_VARARGS, draw_doc},
    {"drop", drop, METH_VARARGS, drop_doc},
    {"normalize", normalize, METH_VARARGS, normalize_doc},
    {"descend_norm", descend_norm, METH_VARARGS, descend_norm_doc},
    {NULL, NULL, 0, NULL},
};

static int
start_module(PyObject *module)
{
    return PyModule_AddIntConstant(module, "VERSION", VERSION);
}

static PyModuleDef_Slot steps[] = {{Py_mod_exec, start_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernels",
    .m_doc = "Attention within each of many texts, norms, GELU and dropout; see koret.retrieval.compiled.",
    .m_methods = methods,
    .m_slots = steps,
};

PyMODINIT_FUNC
PyInit__kernels(void)
{
    return PyModuleDef_Init(&definition);
}
