/* Texts as the compiled passes read and write them: characters, buffers, and the classes of characters that
 * koret.data.markup names. Texts are read whatever their width; positions are code points. */

#ifndef KORET_TEXT_H
#define KORET_TEXT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

typedef struct {
    int kind;
    const void *data;
    Py_ssize_t length;
} Text;

static inline Py_UCS4
at(const Text *text, Py_ssize_t i)
{
    return PyUnicode_READ(text->kind, text->data, i);
}

/* The loop for each width of string, s being its characters: where a switch for every one of them would cost most. */
#define FOR_WIDTH(text, LOOP)                                      \
    switch ((text)->kind) {                                        \
    case PyUnicode_1BYTE_KIND: {                                   \
        const Py_UCS1 *s = (text)->data;                           \
        LOOP                                                       \
    } break;                                                       \
    case PyUnicode_2BYTE_KIND: {                                   \
        const Py_UCS2 *s = (text)->data;                           \
        LOOP                                                       \
    } break;                                                       \
    default: {                                                     \
        const Py_UCS4 *s = (text)->data;                           \
        LOOP                                                       \
    }                                                              \
    }

static inline int
open_text(PyObject *object, Text *text)
{
    if (!PyUnicode_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a str is needed");
        return -1;
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(object) < 0)
        return -1;
#endif
    text->kind = PyUnicode_KIND(object);
    text->data = PyUnicode_DATA(object);
    text->length = PyUnicode_GET_LENGTH(object);
    return 0;
}

static inline Py_ssize_t
clip(Py_ssize_t value, Py_ssize_t least, Py_ssize_t most)
{
    return value < least ? least : value > most ? most : value;
}

/* The position after `wanted` at i, or -1. */
static inline Py_ssize_t
past(const Text *text, Py_ssize_t i, Py_ssize_t end, const char *wanted)
{
    for (; *wanted; i++, wanted++)
        if (i >= end || at(text, i) != (Py_UCS4)*wanted)
            return -1;
    return i;
}

/* ---- a text being written */

typedef struct {
    Py_UCS4 *data;
    Py_ssize_t length, room;
} Buffer;

static inline int
reserve(Buffer *buffer, Py_ssize_t more)
{
    if (buffer->data && more <= buffer->room - buffer->length)
        return 0;
    Py_ssize_t most = PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(Py_UCS4);
    if (more > most / 2 - buffer->length) {
        PyErr_NoMemory();
        return -1;
    }
    Py_ssize_t room = (buffer->length + more) + (buffer->length + more) / 2 + 16;
    Py_UCS4 *data = PyMem_Realloc(buffer->data, (size_t)room * sizeof(Py_UCS4));
    if (!data) {
        PyErr_NoMemory();
        return -1;
    }
    buffer->data = data;
    buffer->room = room;
    return 0;
}

static inline void
put(Buffer *buffer, Py_UCS4 c) /* the room has been reserved */
{
    buffer->data[buffer->length++] = c;
}

static inline void
put_ascii(Buffer *buffer, const char *text)
{
    while (*text)
        put(buffer, (unsigned char)*text++);
}

/* ---- kinds of characters, as markup.py names them */

enum { PARAGRAPH = 1, LINE, ITEM, ITEM_END, ROW, CELL, CELL_END, TABLE, TABLE_END = 0x0e, SLASH, INNER_CELL,
       HEADING_END, HEADING, LEVEL_1, LEVEL_6 = 0x18 };

static inline int
is_space(Py_UCS4 c) /* str.isspace; a look at the table only where there are some */
{
    return c < 0x80 || (c < 0x3001 && c > 0x1100) ? Py_UNICODE_ISSPACE(c) : c == 0x85 || c == 0xa0;
}

static inline int
is_name_start(Py_UCS4 c)
{
    return (c | 32) >= 'a' && (c | 32) <= 'z';
}

static inline int
is_digit(Py_UCS4 c)
{
    return c >= '0' && c <= '9';
}

static inline int
is_hex(Py_UCS4 c)
{
    return is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'f');
}

static inline int
is_state(Py_UCS4 c) /* _STATE: what opens and closes rows, cells and tables */
{
    return (c >= ROW && c <= TABLE) || c == TABLE_END;
}

static inline int
is_break(Py_UCS4 c) /* _BREAKS */
{
    return (c >= PARAGRAPH && c <= ITEM) || (c >= HEADING_END && c <= LEVEL_6);
}

static inline int
is_separator(Py_UCS4 c) /* _RUN: SPACES, INVISIBLE and MARKERS */
{
    if (c > 0x3000)
        return c == 0xfeff;
    if (c < 0x100)
        return (c > 0 && c <= LEVEL_6) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0xad;
    return c == 0x3000 || (c >= 0x2000 && c <= 0x200b) || c == 0x200e || c == 0x200f || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x2060 || c == 0x1680;
}

static inline int
is_invisible(Py_UCS4 c)
{
    return c == 0x200b || c == 0x200e || c == 0x200f || c == 0x2060 || c == 0xad || c == 0xfeff;
}

/* Characters that are in NFC and never combine with what stands before them, in every version of Unicode: Latin,
 * punctuation, kana, ideographs, Hangul syllables. A text of these alone is in NFC; any other is left to Python. */
static inline int
is_composed(Py_UCS4 c)
{
    return c < 0x300 || (c >= 0xac00 && c <= 0xd7a3) || (c >= 0x4e00 && c <= 0x9fa5) || (c >= 0x2010 && c <= 0x205e) ||
           (c >= 0x3001 && c <= 0x3029) || (c >= 0x3041 && c <= 0x3094) || (c >= 0x309b && c <= 0x30fe) ||
           (c >= 0x3131 && c <= 0x318e) || (c >= 0x2150 && c <= 0x22ff) || (c >= 0x2460 && c <= 0x26ff) ||
           (c >= 0x3200 && c <= 0x321c) || (c >= 0x3260 && c <= 0x32fe) || (c >= 0x3300 && c <= 0x33ff) ||
           (c >= 0xff01 && c <= 0xffdc);
}

/* ---- the passes, each a function of the module */

extern PyObject *koret_mark_tags(PyObject *module, PyObject *args);
extern PyObject *koret_join_marks(PyObject *module, PyObject *args);
extern PyObject *koret_inspect(PyObject *module, PyObject *source);
extern PyObject *koret_find_opening(PyObject *module, PyObject *args);
extern PyObject *koret_squeeze(PyObject *module, PyObject *source);
extern PyObject *koret_fold(PyObject *module, PyObject *source);
extern PyObject *koret_read_lines(PyObject *module, PyObject *args);
extern void koret_fill_slots(void);

#endif
