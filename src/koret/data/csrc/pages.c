/* What a page does not have need not be looked for. */

#include "text.h"

static inline int
is_control(Py_UCS4 c) /* markup.CONTROLS */
{
    return ((c < 32) & !((c >= '\t') & (c <= '\r'))) | (c == 127);
}

/* Whether a quoted value begins at i and has an angle bracket in it. A value ends at its own quote, so all of them
 * together are read twice at most. */
static int
opens_value_with_bracket(const Text *text, Py_ssize_t i)
{
    if (i < text->length && (at(text, i) == ' ' || at(text, i) == '\t' || at(text, i) == '\r' || at(text, i) == '\n'))
        i++;
    Py_UCS4 quote = i < text->length ? at(text, i) : 0;
    if (quote != '"' && quote != '\'')
        return 0;
    for (i++; i < text->length; i++) {
        Py_UCS4 c = at(text, i);
        if (c == quote)
            return 0;
        if (c == '<' || c == '>')
            return 1;
    }
    return 0;
}

PyObject *
koret_inspect(PyObject *module, PyObject *source)
{
    Text text;
    if (open_text(source, &text) < 0)
        return NULL;
    int controls = 0, brackets = 0;
    FOR_WIDTH(&text, {
        for (Py_ssize_t i = 0; i < text.length; i++) /* to the end: many at a time */
            controls |= is_control(s[i]);
    })
    for (Py_ssize_t i = 0; i < text.length && !brackets; i++) {
        i = PyUnicode_FindChar(source, '=', i, text.length, 1);
        if (i < 0) {
            if (i == -2)
                return NULL;
            break;
        }
        brackets = opens_value_with_bracket(&text, i + 1);
    }
    return Py_BuildValue("OO", controls ? Py_True : Py_False, brackets ? Py_True : Py_False);
}

PyObject *
koret_find_opening(PyObject *module, PyObject *args)
{
    static const char *const openings[] = {"scr", "sty", "mat", "hea", "tit", "tem", "svg", "!--"};
    PyObject *source;
    Py_ssize_t i, end;
    Text text;
    if (!PyArg_ParseTuple(args, "Unn", &source, &i, &end) || open_text(source, &text) < 0)
        return NULL;
    end = clip(end, 0, text.length);
    for (i = clip(i, 0, end);; i++) {
        FOR_WIDTH(&text, {
            while (i < end && s[i] != '<')
                i++;
        })
        if (i + 3 >= end)
            break;
        Py_UCS4 letters[3];
        for (int k = 0; k < 3; k++) {
            letters[k] = at(&text, i + 1 + k);
            if (letters[k] >= 'A' && letters[k] <= 'Z')
                letters[k] |= 32;
        }
        for (size_t n = 0; n < sizeof(openings) / sizeof(*openings); n++) {
            const char *name = openings[n];
            if (letters[0] == (Py_UCS4)name[0] && letters[1] == (Py_UCS4)name[1] && letters[2] == (Py_UCS4)name[2])
                return PyLong_FromSsize_t(i);
        }
    }
    return PyLong_FromLong(-1);
}
