/* Texts reduced to what they are compared by (koret.data.keys); None where that takes more than these tables. */

#include "text.h"

PyObject *
koret_squeeze(PyObject *module, PyObject *source)
{
    Text text;
    if (open_text(source, &text) < 0)
        return NULL;
    if (text.length > PY_SSIZE_T_MAX / 3)
        return PyErr_NoMemory();
    PyObject *result = PyBytes_FromStringAndSize(NULL, 3 * text.length);
    if (!result)
        return NULL;
    char *start = PyBytes_AS_STRING(result), *out = start;
    int space = 0;
    for (Py_ssize_t i = 0; i < text.length; i++) {
        Py_UCS4 c = at(&text, i);
        if (is_space(c)) {
            space = out > start;
            continue;
        }
        if (!is_composed(c)) {
            Py_DECREF(result);
            Py_RETURN_NONE;
        }
        if (space)
            *out++ = ' ';
        space = 0;
        if (c < 0x80) {
            *out++ = (char)c;
        }
        else if (c < 0x800) {
            *out++ = (char)(0xc0 | c >> 6);
            *out++ = (char)(0x80 | (c & 63));
        }
        else { /* composed ones are below 0x10000 */
            *out++ = (char)(0xe0 | c >> 12);
            *out++ = (char)(0x80 | (c >> 6 & 63));
            *out++ = (char)(0x80 | (c & 63));
        }
    }
    _PyBytes_Resize(&result, out - start);
    return result;
}

/* The lower case of a character that NFKC leaves alone and that never combines; 0 for every other one. */
static inline Py_UCS4
lower_plain(Py_UCS4 c)
{
    if (c < 0x80)
        return c >= 'A' && c <= 'Z' ? c | 32 : c;
    if (c >= 0xc0 && c <= 0xff)
        return c <= 0xde && c != 0xd7 ? c | 32 : c;
    int plain = (c >= 0xac00 && c <= 0xd7a3) || (c >= 0x4e00 && c <= 0x9fa5) || (c >= 0x2018 && c <= 0x2023) ||
                (c >= 0x2012 && c <= 0x2016) || (c >= 0x3001 && c <= 0x301b) || (c >= 0x3041 && c <= 0x3094) ||
                (c >= 0x30a0 && c <= 0x30fe) || (c >= 0x2190 && c <= 0x21ff) || (c >= 0x2500 && c <= 0x26ff) ||
                c == 0xb7;
    return plain ? c : 0;
}

PyObject *
koret_fold(PyObject *module, PyObject *source)
{
    Text text;
    Buffer folded = {0};
    if (open_text(source, &text) < 0 || reserve(&folded, text.length) < 0)
        return NULL;
    PyObject *result = NULL;
    for (Py_ssize_t i = 0; i < text.length; i++) {
        Py_UCS4 c = at(&text, i);
        if (is_space(c) && c < 0x80)
            continue;
        c = lower_plain(c);
        if (!c) {
            result = Py_None;
            Py_INCREF(result);
            break;
        }
        put(&folded, c);
    }
    if (!result)
        result = PyUnicode_FromKindAndData(PyUnicode_4BYTE_KIND, folded.data, folded.length);
    PyMem_Free(folded.data);
    return result;
}
