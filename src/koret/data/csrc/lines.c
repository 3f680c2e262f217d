/* Lines of clean text, their headings and tables: passages._Splitter._read_lines. */

#include "text.h"

typedef struct {
    Py_ssize_t start, end, cells;
    Py_ssize_t header; /* how many lines above the one that names the columns is; 0: there is none */
    int level;
} Line;

static Py_ssize_t
count_cells(const Text *text, const Line *line) /* of a table row; 0 for a list item */
{
    if (past(text, line->start, text->length, "- ") >= 0)
        return 0;
    Py_ssize_t cells = 1;
    for (Py_ssize_t i = line->start; i < line->end; i++) {
        FOR_WIDTH(text, {
            while (i < line->end && s[i] != '|')
                i++;
        })
        if (i > line->start && i + 1 < line->end && at(text, i - 1) == ' ' && at(text, i + 1) == ' ') {
            cells++;
            i += 2; /* the space after it is not the one before the next */
        }
    }
    return cells;
}

static int
find_level(const Text *text, const Line *line) /* passages._HEADING */
{
    Py_ssize_t i = line->start, first;
    while (i < line->end && at(text, i) == '#')
        i++;
    Py_ssize_t level = i - line->start;
    for (first = i; i < line->end && at(text, i) == ' ';)
        i++;
    int is_heading = level >= 2 && level <= 6 && i > first && i < line->end && !is_space(at(text, i));
    return is_heading ? (int)level : 0;
}

static void
mark_header(Line *lines, Py_ssize_t first, Py_ssize_t count) /* passages._mark_table, for a block that starts at first */
{
    Py_ssize_t header = first;
    for (Py_ssize_t i = first; i < count; i++)
        if (lines[i].cells > lines[header].cells)
            header = i;
    if (header < count && lines[header].cells >= 3)
        for (Py_ssize_t i = header + 1; i < count; i++)
            lines[i].header = i - header;
}

PyObject *
koret_read_lines(PyObject *module, PyObject *args)
{
    PyObject *source, *result = NULL;
    int html;
    Text text;
    if (!PyArg_ParseTuple(args, "Up", &source, &html) || open_text(source, &text) < 0)
        return NULL;
    Line *lines = NULL;
    Py_ssize_t count = 0, room = 0, first = 0; /* the open block starts at lines[first] */
    for (Py_ssize_t start = 0; start <= text.length;) {
        Line line = {.start = start};
        Py_ssize_t stop = start;
        FOR_WIDTH(&text, {
            while (stop < text.length && s[stop] != '\n')
                stop++;
        })
        start = stop + 1;
        line.end = stop;
        while (line.start < line.end && is_space(at(&text, line.start)))
            line.start++;
        while (line.start < line.end && is_space(at(&text, line.end - 1)))
            line.end--;
        if (line.start == line.end) {
            mark_header(lines, first, count);
            first = count;
            continue;
        }
        if (html) {
            line.level = find_level(&text, &line);
            line.cells = count_cells(&text, &line);
        }
        if (count == room) {
            room = 2 * room + 64;
            Line *grown = lines;
            PyMem_Resize(grown, Line, (size_t)room); /* NULL for sizes that overflow, too */
            if (!grown) {
                PyErr_NoMemory();
                goto done;
            }
            lines = grown;
        }
        lines[count++] = line;
    }
    mark_header(lines, first, count);
    PyObject *places = PyList_New(count), *texts = PyList_New(count);
    int failed = !places || !texts;
    for (Py_ssize_t i = 0; !failed && i < count; i++) {
        Line *line = &lines[i];
        PyObject *place = Py_BuildValue("nnin", line->start, line->end, line->level, line->header);
        PyObject *string = PyUnicode_Substring(source, line->start, line->end);
        failed = !place || !string;
        PyList_SET_ITEM(places, i, place); /* a list may hold NULL until it is dropped */
        PyList_SET_ITEM(texts, i, string);
    }
    if (!failed)
        result = PyTuple_Pack(2, places, texts);
    Py_XDECREF(places);
    Py_XDECREF(texts);
done:
    PyMem_Free(lines);
    return result;
}
