/* Compiled kernels for koret.retrieval.compiled, which chooses, checks what it passes, and says what is computed. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

#include "kernel.h"

#define VERSION 3 /* compiled.py asks for this one: raise both whenever a call or a result changes */

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
"attend(kernel, qkv, gradient, result, bounds, texts, longest, heads, size, threads)\n\n"
"Attention within each text, by the kernel of this name. The next four are addresses: see Task in kernel.h.\n"
"Raises ValueError for a kernel there is not, MemoryError.");

static PyObject *
attend(PyObject *module, PyObject *args)
{
    const char *name;
    unsigned long long qkv, gradient, result, bounds;
    long texts, longest, heads, size;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKKlllli", &name, &qkv, &gradient, &result, &bounds, &texts, &longest, &heads, &size,
                          &threads))
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
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = run_units(kernel, &task, threads);
    Py_END_ALLOW_THREADS
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

enum { PIECE = 4096 }; /* numbers that a thread takes at a time: a multiple of dropout's places */

/* A pass over numbers, the one that is kept `place` bytes behind the start of a Kernel. */
static PyObject *
run_pass(PyObject *args, size_t place)
{
    const char *name;
    unsigned long long x, y, slopes, seed = 0;
    unsigned int least = 0;
    float factor = 1;
    long count;
    int threads;
    if (!PyArg_ParseTuple(args, "sKKKli|KIf", &name, &x, &y, &slopes, &count, &threads, &seed, &least, &factor))
        return NULL;
    const Kernel *kernel = find_kernel(name);
    if (!kernel)
        return NULL;
    Pass *const pass = *(Pass *const *)((const char *)kernel + place);
    const Numbers numbers = {
        .x = (void *)(uintptr_t)x,
        .y = (void *)(uintptr_t)y,
        .slopes = (void *)(uintptr_t)slopes,
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

PyDoc_STRVAR(drop_doc,
"drop(kernel, x, y, 0, count, threads, seed, least, factor)\n\n"
"Each of count numbers at the address x times factor, or 0 where its draw, of 0 to 65535 by seed and place, is less\n"
"than least: to y, which may be the same. Raises ValueError for a kernel there is not.");

static PyObject *
drop(PyObject *module, PyObject *args)
{
    return run_pass(args, offsetof(Kernel, drop));
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
    {"drop", drop, METH_VARARGS, drop_doc},
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
    .m_doc = "Attention within each of many texts, GELU and dropout; see koret.retrieval.compiled.",
    .m_methods = methods,
    .m_slots = steps,
};

PyMODINIT_FUNC
PyInit__kernels(void)
{
    return PyModuleDef_Init(&definition);
}
