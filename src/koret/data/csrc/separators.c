/* Runs of separators joined to one, cells and headings made one line: markup._join_marks. */

#include "text.h"

/* Breaks inside cells become SLASH, and tables inside cells too: markup._flatten_cells. */
static int
flatten_cells(Py_UCS4 *marked, Py_ssize_t length, int in_cell)
{
    char *outer = NULL; /* for each open table around the current one: was it opened inside a cell? */
    Py_ssize_t depth = 0, room = 0;
    int inside = in_cell, nested = 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        Py_UCS4 c = marked[i];
        if (c > LEVEL_6)
            continue;
        if (!is_state(c)) {
            if ((inside || nested) && is_break(c))
                marked[i] = SLASH;
        }
        else if (c == TABLE) {
            if (depth == room) {
                char *grown = PyMem_Realloc(outer, (size_t)(room = 2 * room + 64));
                if (!grown) {
                    PyMem_Free(outer);
                    PyErr_NoMemory();
                    return -1;
                }
                outer = grown;
            }
            outer[depth++] = (char)nested;
            nested = inside || nested;
            inside = 0;
            marked[i] = nested ? SLASH : TABLE;
        }
        else if (c == TABLE_END) {
            inside = nested;
            nested = depth ? outer[--depth] : 0;
            marked[i] = inside || nested ? SLASH : TABLE_END;
        }
        else if (c == CELL_END) {
            inside = 0;
        }
        else {
            inside = c == CELL;
            if (nested)
                marked[i] = inside ? INNER_CELL : SLASH;
        }
    }
    PyMem_Free(outer);
    return 0;
}

/* What stands between a heading's mark and its end is one line: _WHOLE_HEADING. */
static void
flatten_headings(Py_UCS4 *marked, Py_ssize_t length)
{
    Py_ssize_t opened = -1;
    for (Py_ssize_t i = 0; i < length; i++) {
        if (marked[i] == HEADING) {
            opened = i;
        }
        else if (marked[i] == HEADING_END && opened >= 0) {
            for (Py_ssize_t k = opened + 2; k < i; k++)
                if (is_state(marked[k]) || (marked[k] >= PARAGRAPH && marked[k] <= ITEM))
                    marked[k] = ' ';
            opened = -1;
        }
    }
}

/* What a run of separators opens and does not close again, markup._lead: 2 to 6, a heading of that level; 1, a list
 * item; 0, neither. */
static int
find_lead(const Py_UCS4 *run, Py_ssize_t length)
{
    int heading_closed = 0, item = -1; /* -1: not decided yet */
    for (Py_ssize_t i = length - 1; i >= 0 && (!heading_closed || item < 0); i--) {
        Py_UCS4 c = run[i];
        if (c == HEADING && !heading_closed) {
            int level = i + 1 < length ? (int)clip((Py_ssize_t)run[i + 1] - HEADING, 2, 6) : 2;
            return level;
        }
        if (c == HEADING_END)
            heading_closed = 1;
        else if (item < 0 && (c == ITEM || c == ITEM_END))
            item = c == ITEM;
    }
    return item > 0;
}

static int
put_lead(Buffer *clean, int lead) /* returns its length */
{
    put_ascii(clean, lead > 1 ? &"######"[6 - lead] : lead ? "-" : "");
    put_ascii(clean, lead ? " " : "");
    return lead ? lead + 1 : 0;
}

/* The one separator that a run becomes: markup._join. It is never longer than twice the run and eight more. */
static void
put_join(Buffer *clean, const Py_UCS4 *run, Py_ssize_t length, int lead)
{
    unsigned seen = 0; /* bit by bit, the marks in it */
    int space = 0;
    Py_ssize_t cells = 0, row_cells = 0, inner_cells = 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        Py_UCS4 c = run[i];
        if (c > LEVEL_6 || (c >= '\t' && c <= '\r')) {
            space |= !is_invisible(c);
            continue;
        }
        seen |= 1u << c;
        cells += c == CELL;
        inner_cells += c == INNER_CELL;
        row_cells = c == ROW ? 0 : row_cells + (c == CELL);
    }
#define SEEN(mark) (seen >> (mark) & 1)
    int paragraph = SEEN(PARAGRAPH) || SEEN(TABLE) || SEEN(TABLE_END);
    if (lead) {
        put_ascii(clean, lead > 1 ? "\n\n" : "\n");
        put_lead(clean, lead);
    }
    else if (SEEN(ROW)) {
        put_ascii(clean, paragraph ? "\n\n" : "\n");
        for (; row_cells > 1; row_cells--)
            put_ascii(clean, "| ");
    }
    else if (paragraph || SEEN(HEADING) || SEEN(HEADING_END)) {
        put_ascii(clean, "\n\n");
    }
    else if (cells || (inner_cells && !SEEN(SLASH))) {
        for (Py_ssize_t n = cells ? cells : inner_cells; n; n--)
            put_ascii(clean, " |");
        put(clean, ' ');
    }
    else if (SEEN(SLASH)) {
        put_ascii(clean, " / ");
    }
    else if (SEEN(LINE) || SEEN(ITEM) || SEEN(ITEM_END)) {
        put(clean, '\n');
    }
    else if (space || SEEN(CELL_END)) {
        put(clean, ' ');
    }
#undef SEEN
}

typedef struct {
    PyObject *wanted, *found; /* sorted positions in the marked text; what they are in the clean text */
    Py_ssize_t next, position; /* the first one not yet found; PY_SSIZE_T_MAX: none left */
} Places;

static int
read_place(Places *places)
{
    places->position = PY_SSIZE_T_MAX;
    if (places->next < PyTuple_GET_SIZE(places->wanted)) {
        places->position = PyLong_AsSsize_t(PyTuple_GET_ITEM(places->wanted, places->next));
        if (places->position == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int
add_place(Places *places, Py_ssize_t place, int is_item)
{
    PyObject *pair = Py_BuildValue("nO", place, is_item ? Py_True : Py_False);
    int failed = !pair || PyList_Append(places->found, pair) < 0;
    Py_XDECREF(pair);
    places->next++;
    return failed ? -1 : read_place(places);
}

/* Join the runs of separators; `start_item` says that the text opened with a list item, `composed` that it is NFC. */
static int
join_runs(const Py_UCS4 *marked, Py_ssize_t length, Buffer *clean, Places *starts, Places *ends, int *start_item,
          int *composed)
{
    Py_ssize_t i = 0;
    *start_item = 0;
    *composed = 1;
    if (reserve(clean, length + 16) < 0)
        return -1;
    do { /* text, which may be empty at either end, then a run */
        Py_ssize_t first = i, clean_first = clean->length;
        Py_UCS4 *out = clean->data + clean->length;
        for (; i < length; i++) {
            Py_UCS4 c = marked[i];
            if (c < 0xac00 || c > 0xd7a3) { /* no Hangul syllable */
                if (is_separator(c)) {
                    if (c != ' ' || (i + 1 < length && is_separator(marked[i + 1])))
                        break;
                }
                else if (!is_composed(c)) {
                    *composed = 0;
                }
            }
            *out++ = c;
        }
        clean->length = out - clean->data;
        while (starts->position < i || (i == length && starts->position != PY_SSIZE_T_MAX))
            if (add_place(starts, clean_first + clip(starts->position - first, 0, i - first), 0) < 0)
                return -1;
        while (ends->position <= i || (i == length && ends->position != PY_SSIZE_T_MAX))
            if (add_place(ends, clean_first + clip(ends->position - first, 0, i - first), 0) < 0)
                return -1;
        if (i == length)
            break;
        Py_ssize_t run = i, clean_run = clean->length;
        while (i < length && is_separator(marked[i]))
            i++;
        if (reserve(clean, 2 * (i - run) + 16 + length - i) < 0)
            return -1;
        int lead = find_lead(marked + run, i - run);
        if (run == 0) { /* a text does not start with a separator, */
            if (i < length)
                put_lead(clean, lead);
            *start_item = lead == 1;
        }
        else if (i < length) { /* or end with one */
            put_join(clean, marked + run, i - run, lead);
        }
        int written = lead && clean->length > clean_run; /* the lead is what the run ends with */
        while (starts->position < i) {
            Py_ssize_t from = clip(starts->position, run, i);
            int rest = find_lead(marked + from, i - from);
            int shown = written && rest == lead;
            if (add_place(starts, clean->length - (shown ? (lead > 1 ? lead + 1 : 2) : 0), shown && rest == 1) < 0)
                return -1;
        }
        while (ends->position <= i)
            if (add_place(ends, clean_run, 0) < 0)
                return -1;
    } while (1);
    return 0;
}

PyObject *
koret_join_marks(PyObject *module, PyObject *args)
{
    PyObject *source, *result = NULL;
    int in_cell, start_item, composed;
    Places starts = {0}, ends = {0};
    Buffer clean = {0};
    if (!PyArg_ParseTuple(args, "UpO!O!", &source, &in_cell, &PyTuple_Type, &starts.wanted, &PyTuple_Type,
                          &ends.wanted))
        return NULL;
    Text text;
    Py_UCS4 *marked = open_text(source, &text) < 0 ? NULL : PyUnicode_AsUCS4Copy(source);
    starts.found = PyList_New(0);
    ends.found = PyList_New(0);
    if (!marked || !starts.found || !ends.found || read_place(&starts) < 0 || read_place(&ends) < 0 ||
        flatten_cells(marked, text.length, in_cell) < 0)
        goto done;
    flatten_headings(marked, text.length);
    if (join_runs(marked, text.length, &clean, &starts, &ends, &start_item, &composed) == 0)
        result = Py_BuildValue("NOOOO", PyUnicode_FromKindAndData(PyUnicode_4BYTE_KIND, clean.data, clean.length),
                               start_item ? Py_True : Py_False, composed ? Py_True : Py_False, starts.found,
                               ends.found);
done:
    PyMem_Free(marked);
    PyMem_Free(clean.data);
    Py_XDECREF(starts.found);
    Py_XDECREF(ends.found);
    return result;
}
