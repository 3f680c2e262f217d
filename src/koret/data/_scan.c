/* Passes over whole texts that Python would make piece by piece. koret.data.native chooses; the Python code next to
 * every call says what is computed, gives the same results and is what the tests compare with.
 *
 * Texts are read through PyUnicode_READ whatever their width, positions are code points, every pass is linear in its
 * input, and nothing is kept between calls. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#define VERSION 1 /* native.py asks for this one: raise both whenever a result changes */

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

static int
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

/* ---- a text being written */

typedef struct {
    Py_UCS4 *data;
    Py_ssize_t length, room;
} Buffer;

static int
reserve(Buffer *buffer, Py_ssize_t more)
{
    if (more <= buffer->room - buffer->length)
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

static void
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

/* ---- tags */

/* Names of tags and the marks of their opening and closing; `number` is the name as a number in base 37. */
#define LONGEST_NAME 10
typedef struct {
    const char *name;
    char opening, closing;
} Tag;

static const Tag tags[] = {
    {"table", TABLE, TABLE_END}, {"tr", ROW, CELL_END}, {"td", CELL, CELL_END}, {"th", CELL, CELL_END},
    {"li", ITEM, ITEM_END}, {"dt", LINE, 0}, {"dd", LINE, 0}, {"br", LINE, LINE}, {"rt", '(', ')'},
    {"h1", LEVEL_1, HEADING_END}, {"h2", LEVEL_1 + 1, HEADING_END}, {"h3", LEVEL_1 + 2, HEADING_END},
    {"h4", LEVEL_1 + 3, HEADING_END}, {"h5", LEVEL_1 + 4, HEADING_END}, {"h6", LEVEL_6, HEADING_END},
#define BLOCK(name) {name, PARAGRAPH, PARAGRAPH}
    BLOCK("address"), BLOCK("article"), BLOCK("aside"), BLOCK("blockquote"), BLOCK("body"), BLOCK("caption"),
    BLOCK("center"), BLOCK("details"), BLOCK("dir"), BLOCK("div"), BLOCK("dl"), BLOCK("fieldset"),
    BLOCK("figcaption"), BLOCK("figure"), BLOCK("footer"), BLOCK("form"), BLOCK("head"), BLOCK("header"),
    BLOCK("hr"), BLOCK("html"), BLOCK("legend"), BLOCK("main"), BLOCK("menu"), BLOCK("nav"), BLOCK("noscript"),
    BLOCK("ol"), BLOCK("option"), BLOCK("p"), BLOCK("pre"), BLOCK("section"), BLOCK("select"), BLOCK("summary"),
    BLOCK("title"), BLOCK("ul"), BLOCK("video"), BLOCK("audio"),
#undef BLOCK
};

#define SLOTS 256
static struct {
    unsigned long long number; /* 0: free */
    char opening, closing;
} slots[SLOTS];

static inline unsigned long long
add_letter(unsigned long long number, Py_UCS4 c)
{
    return number * 37 + (is_digit(c) ? c - '0' + 1 : (c | 32) - 'a' + 11);
}

static inline unsigned
find_slot(unsigned long long number)
{
    unsigned slot = (unsigned)((number * 0x9E3779B97F4A7C15ULL) >> 56);
    while (slots[slot].number && slots[slot].number != number)
        slot = (slot + 1) % SLOTS;
    return slot;
}

static void
fill_slots(void)
{
    for (size_t i = 0; i < sizeof(tags) / sizeof(*tags); i++) {
        unsigned long long number = 0;
        for (const char *c = tags[i].name; *c; c++)
            number = add_letter(number, (Py_UCS4)*c);
        unsigned slot = find_slot(number);
        slots[slot].opening = tags[i].opening;
        slots[slot].closing = tags[i].closing;
        slots[slot].number = number;
    }
}

/* Write the mark of the tag at i, which is no token of several tags: markup._mark_tag. */
static void
put_mark(const Text *text, Py_ssize_t i, Py_ssize_t end, Buffer *marked)
{
    int closes = i + 1 < end && at(text, i + 1) == '/';
    unsigned long long number = 0;
    Py_ssize_t start = i + 1 + closes;
    for (i = start; i < end; i++) {
        Py_UCS4 c = at(text, i);
        if (!is_name_start(c) && !(is_digit(c) && i > start))
            break;
        if (i - start == LONGEST_NAME)
            return;
        number = add_letter(number, c);
    }
    unsigned slot = find_slot(number);
    if (i == start || !slots[slot].number)
        return;
    char mark = closes ? slots[slot].closing : slots[slot].opening;
    if (mark >= LEVEL_1 && mark <= LEVEL_6)
        put(marked, HEADING);
    if (mark)
        put(marked, (Py_UCS4)mark);
}

/* Matchers: each returns the position after what it looks for at i, or -1. */

static Py_ssize_t
past(const Text *text, Py_ssize_t i, Py_ssize_t end, const char *wanted)
{
    for (; *wanted; i++, wanted++)
        if (i >= end || at(text, i) != (Py_UCS4)*wanted)
            return -1;
    return i;
}

static Py_ssize_t
past_brackets(const Text *text, Py_ssize_t i, Py_ssize_t end) /* [^<>]*> */
{
    FOR_WIDTH(text, {
        while (i < end && s[i] != '<' && s[i] != '>')
            i++;
    })
    return i < end && at(text, i) == '>' ? i + 1 : -1;
}

static Py_ssize_t
past_tag(const Text *text, Py_ssize_t i, Py_ssize_t end, const char *start) /* <start[^<>]*> */
{
    i = past(text, i, end, start);
    return i < 0 ? -1 : past_brackets(text, i, end);
}

static Py_ssize_t
past_space(const Text *text, Py_ssize_t i, Py_ssize_t end) /* \s? */
{
    return i < end && is_space(at(text, i)) ? i + 1 : i;
}

static Py_ssize_t
past_element(const Text *text, Py_ssize_t i, Py_ssize_t end, const char *start, int most, const char *close)
{
    i = past_tag(text, i, end, start);
    if (i < 0)
        return -1;
    Py_ssize_t first = i;
    while (i < end && i - first <= most && at(text, i) != '<' && at(text, i) != '>')
        i++;
    return i == first || i - first > most ? -1 : past(text, i, end, close);
}

static Py_ssize_t
past_edit_links(const Text *text, Py_ssize_t i, Py_ssize_t end, int count) /* from the first <a> of _EDIT_LINK on */
{
    Py_ssize_t links[2]; /* where a link ends: with a span after it, which comes first, and without */
    links[1] = count < 2 ? past_element(text, i, end, "<a", 20, "</a>") : -1;
    links[0] = links[1] >= 0 ? past_element(text, links[1], end, "<span", 9, "</span>") : -1;
    for (int choice = 0; choice < 2; choice++) {
        Py_ssize_t found = links[choice] >= 0 ? past_edit_links(text, links[choice], end, count + 1) : -1;
        if (found >= 0)
            return found;
    }
    i = count ? past_tag(text, i, end, "<span") : -1;
    return i < 0 ? -1 : past(text, i, end, "]</span></span>");
}

static Py_ssize_t
past_span(const Text *text, Py_ssize_t i, Py_ssize_t end) /* _EDIT_LINK or _BACKLINK after the first tag */
{
    Py_ssize_t next = past_tag(text, i, end, "<span");
    if (next >= 0) {
        next = past(text, next, end, "[</span>");
        return next < 0 ? -1 : past_edit_links(text, next, end, 0);
    }
    next = past_tag(text, i, end, "<a");
    if (next < 0 || next >= end || at(text, next) != 0x2191)
        return -1;
    next = past(text, next + 1, end, "</a></span>");
    return next < 0 ? -1 : past_space(text, next, end);
}

static Py_ssize_t
past_inline(const Text *text, Py_ssize_t i, Py_ssize_t end) /* </?(?:[abi]|span)(?:\s[^<>]*)?> */
{
    i++;
    if (i < end && at(text, i) == '/')
        i++;
    Py_ssize_t name = past(text, i, end, "span");
    if (name < 0)
        name = i < end && (at(text, i) == 'a' || at(text, i) == 'b' || at(text, i) == 'i') ? i + 1 : -1;
    if (name < 0 || name >= end)
        return -1;
    if (at(text, name) == '>')
        return name + 1;
    return is_space(at(text, name)) ? past_brackets(text, name, end) : -1;
}

static Py_ssize_t
past_closing(const Text *text, Py_ssize_t i, Py_ssize_t end) /* </[a-z]{1,5}> */
{
    i = past(text, i, end, "</");
    if (i < 0)
        return -1;
    Py_ssize_t first = i;
    while (i < end && i - first < 6 && at(text, i) >= 'a' && at(text, i) <= 'z')
        i++;
    return i == first || i - first > 5 ? -1 : past(text, i, end, ">");
}

static Py_ssize_t
past_references(const Text *text, Py_ssize_t i, Py_ssize_t end, int count) /* _REFERENCE after the first tag */
{
    Py_ssize_t next;
    for (int n = 0; n < 3 && i + 1 < end && at(text, i) == '<' && at(text, i + 1) >= 'a' && at(text, i + 1) <= 'z' &&
                    (next = past_brackets(text, i + 1, end)) >= 0; n++)
        i = next;
    next = past(text, i, end, "[");
    i = next >= 0 ? next : past(text, i, end, "&#91;");
    if (i < 0)
        return -1;
    for (int n = 0;; n++) { /* _MARK: text, up to eight tags with text after each */
        for (Py_ssize_t first = i; i < end && i - first < 30; i++) {
            Py_UCS4 c = at(text, i);
            if (c == '<' || c == '>' || c == '[' || c == ']' || (c == '&' && past(text, i, end, "&#93;") >= 0))
                break;
        }
        if (n == 8 || i >= end || at(text, i) != '<')
            break;
        i = past_inline(text, i, end);
        if (i < 0)
            return -1;
    }
    next = past(text, i, end, "]");
    i = next >= 0 ? next : past(text, i, end, "&#93;");
    if (i < 0)
        return -1;
    Py_ssize_t closed[4] = {i};
    int closings = 0;
    while (closings < 3 && (next = past_closing(text, closed[closings], end)) >= 0)
        closed[++closings] = next;
    for (; closings >= 0; closings--) {
        i = past_space(text, closed[closings], end);
        if (count < 5 && (next = past_references(text, i, end, count + 1)) >= 0)
            return next;
        if ((next = past(text, i, end, "</sup>")) >= 0)
            return next;
    }
    return -1;
}

/* The end of the tag at i, or of the several tags that are one token there (`whole`); -1: no markup. */
static Py_ssize_t
past_token(const Text *text, Py_ssize_t i, Py_ssize_t end, int *whole)
{
    *whole = 0;
    Py_UCS4 c = i + 1 < end ? at(text, i + 1) : 0;
    if (!is_name_start(c) && c != '/' && c != '!' && c != '?')
        return -1;
    Py_ssize_t stop = past_brackets(text, i + 2, end), several = -1;
    if (stop < 0)
        return -1;
    if (stop < end) {
        Py_UCS4 second = at(text, i + 2);
        if (c == 's' && second == 'p' && past(text, i + 2, end, "pan") >= 0)
            several = past_span(text, stop, end);
        else if (c == 's' && second == 'u' && past(text, i + 2, end, "up") >= 0)
            several = past_references(text, stop, end, 0);
        else if (c == '/' && second == 'r' && past(text, i, end, "</rp>") >= 0)
            several = past_tag(text, past_space(text, stop, end), end, "<rt");
        else if (c == '/' && second == 'r' && past(text, i, end, "</rt>") >= 0)
            several = past_tag(text, past_space(text, stop, end), end, "<rp");
    }
    *whole = several >= 0;
    return several >= 0 ? several : stop;
}

static Py_ssize_t
past_entity(const Text *text, Py_ssize_t i, Py_ssize_t end) /* regions.ENTITY */
{
    Py_ssize_t first = i + 1;
    if (first < end && at(text, first) == '#') {
        int hex = first + 1 < end && (at(text, first + 1) | 32) == 'x';
        first += 1 + hex;
        Py_ssize_t most = hex ? 16 : 20;
        for (i = first; i < end && i - first <= most && (hex ? is_hex(at(text, i)) : is_digit(at(text, i)));)
            i++;
        if (i == first || i - first > most)
            return -1;
    }
    else {
        for (i = first; i < end && i - first < 32 && (is_name_start(at(text, i)) || (i > first && is_digit(at(text, i))));)
            i++;
        if (i - first < 2)
            return -1;
    }
    return i < end && at(text, i) == ';' ? i + 1 : i;
}

static int
put_text(Buffer *buffer, PyObject *piece)
{
    Text text;
    if (open_text(piece, &text) < 0 || reserve(buffer, text.length) < 0)
        return -1;
    for (Py_ssize_t i = 0; i < text.length; i++)
        put(buffer, at(&text, i));
    return 0;
}

static int
mark_stretch(PyObject *source, const Text *text, Py_ssize_t i, Py_ssize_t end, PyObject *decode, Buffer *marked)
{
    if (reserve(marked, end - i) < 0) /* no tag is shorter than its mark */
        return -1;
    while (i < end) {
        Py_UCS4 *out = marked->data + marked->length;
        FOR_WIDTH(text, {
            for (; i < end && s[i] != '<' && s[i] != '&'; i++)
                *out++ = s[i];
        })
        marked->length = out - marked->data;
        if (i == end)
            break;
        Py_UCS4 c = at(text, i);
        Py_ssize_t stop = -1;
        if (c == '<') {
            int whole;
            stop = past_token(text, i, end, &whole);
            if (stop >= 0 && !whole)
                put_mark(text, i, stop, marked);
        }
        else if ((stop = past_entity(text, i, end)) >= 0) {
            PyObject *entity = PyUnicode_Substring(source, i, stop);
            PyObject *piece = entity ? PyObject_CallFunctionObjArgs(decode, entity, NULL) : NULL;
            Py_XDECREF(entity);
            int failed = !piece || put_text(marked, piece) < 0 || reserve(marked, end - stop) < 0;
            Py_XDECREF(piece);
            if (failed)
                return -1;
        }
        if (stop < 0)
            put(marked, c);
        i = stop < 0 ? i + 1 : stop;
    }
    return 0;
}

PyDoc_STRVAR(mark_tags_doc,
"mark_tags(text, begin, stops, decode) -> (marked, places)\n\n"
"The text from begin on with marks for tags. stops are (start, stop, replacement), the last one the end;\n"
"places says where in the marked text each of them is. decode is called with every entity.");

static PyObject *
mark_tags(PyObject *module, PyObject *args)
{
    PyObject *source, *stops, *decode, *result = NULL, *places = NULL;
    Py_ssize_t position;
    Text text;
    Buffer marked = {0};
    if (!PyArg_ParseTuple(args, "UnO!O", &source, &position, &PyTuple_Type, &stops, &decode) ||
        open_text(source, &text) < 0 || !(places = PyList_New(0)))
        return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(stops); i++) {
        Py_ssize_t start, stop;
        PyObject *replacement, *item = PyTuple_GET_ITEM(stops, i);
        if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "nnU", &start, &stop, &replacement))
            goto done;
        if (start >= position) {
            Py_ssize_t last = clip(start, 0, text.length);
            if (mark_stretch(source, &text, clip(position, 0, last), last, decode, &marked) < 0 ||
                put_text(&marked, replacement) < 0)
                goto done;
            position = stop;
        }
        Py_ssize_t place = marked.length - (start == stop ? PyUnicode_GET_LENGTH(replacement) : 0);
        PyObject *number = PyLong_FromSsize_t(place);
        if (!number || PyList_Append(places, number) < 0) {
            Py_XDECREF(number);
            goto done;
        }
        Py_DECREF(number);
    }
    PyObject *string = PyUnicode_FromKindAndData(PyUnicode_4BYTE_KIND, marked.data, marked.length);
    if (string)
        result = Py_BuildValue("NO", string, places);
done:
    PyMem_Free(marked.data);
    Py_DECREF(places);
    return result;
}

/* ---- separators */

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

PyDoc_STRVAR(join_marks_doc,
"join_marks(marked, in_cell, starts, ends) -> (clean, start_item, composed, starts, ends)\n\n"
"The marked text with every run of separators joined to one. starts and ends are sorted positions in it; for each,\n"
"its place in the clean text and whether a list item opens there. composed: certainly in NFC.");

static PyObject *
join_marks(PyObject *module, PyObject *args)
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

/* ---- what a page does not have need not be looked for */

static inline int
is_control(Py_UCS4 c) /* markup.CONTROLS */
{
    return (c < 32 && !(c >= '\t' && c <= '\r')) || c == 127;
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

PyDoc_STRVAR(inspect_doc,
"inspect(text) -> (has_controls, has_quoted_brackets)\n\nWhether markup._CONTROL and _QUOTED_BRACKET find anything.");

static PyObject *
inspect(PyObject *module, PyObject *source)
{
    Text text;
    if (open_text(source, &text) < 0)
        return NULL;
    int controls = 0, brackets = 0;
    for (Py_ssize_t i = 0; i < text.length; i++) {
        FOR_WIDTH(&text, {
            while (i < text.length && s[i] != '=' && !is_control(s[i]))
                i++;
        })
        if (i == text.length)
            break;
        if (at(&text, i) == '=')
            brackets = brackets || opens_value_with_bracket(&text, i + 1);
        else
            controls = 1;
    }
    return Py_BuildValue("OO", controls ? Py_True : Py_False, brackets ? Py_True : Py_False);
}

PyDoc_STRVAR(find_opening_doc,
"find_opening(text, position, end) -> int\n\n"
"Where the next '<' stands after which regions._OPENING has to look, or -1: it begins one of its names or '!--'.");

static PyObject *
find_opening(PyObject *module, PyObject *args)
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

/* ---- keys: texts reduced to what they are compared by; None where that takes more than these tables */

PyDoc_STRVAR(squeeze_doc,
"squeeze(text) -> bytes | None\n\nUTF-8 of the text in NFC with one space for every run of white space.");

static PyObject *
squeeze(PyObject *module, PyObject *source)
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

PyDoc_STRVAR(fold_doc, "fold(text) -> str | None\n\nkeys.fold_text: NFKC, lower case, no white space.");

static PyObject *
fold(PyObject *module, PyObject *source)
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

/* ---- lines of clean text */

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
mark_header(Line *lines, Py_ssize_t count) /* passages._mark_table */
{
    Py_ssize_t header = 0;
    for (Py_ssize_t i = 1; i < count; i++)
        if (lines[i].cells > lines[header].cells)
            header = i;
    if (count && lines[header].cells >= 3)
        for (Py_ssize_t i = header + 1; i < count; i++)
            lines[i].header = i - header;
}

PyDoc_STRVAR(read_lines_doc,
"read_lines(text, html) -> ([(start, end, level, header)], [line])\n\n"
"The lines that are not blank, without white space at their ends; header counts back to the line that names the\n"
"columns of its table, 0: none.");

static PyObject *
read_lines(PyObject *module, PyObject *args)
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
            mark_header(lines + first, count - first);
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
    mark_header(lines + first, count - first);
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

/* ---- the module */

static PyMethodDef methods[] = {
    {"mark_tags", mark_tags, METH_VARARGS, mark_tags_doc},
    {"join_marks", join_marks, METH_VARARGS, join_marks_doc},
    {"inspect", inspect, METH_O, inspect_doc},
    {"find_opening", find_opening, METH_VARARGS, find_opening_doc},
    {"squeeze", squeeze, METH_O, squeeze_doc},
    {"fold", fold, METH_O, fold_doc},
    {"read_lines", read_lines, METH_VARARGS, read_lines_doc},
    {NULL, NULL, 0, NULL},
};

static int
start_module(PyObject *module)
{
    fill_slots();
    return PyModule_AddIntConstant(module, "VERSION", VERSION);
}

static PyModuleDef_Slot steps[] = {{Py_mod_exec, start_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_scan",
    .m_doc = "Passes over whole texts for koret.data; see koret.data.native.",
    .m_methods = methods,
    .m_slots = steps,
};

PyMODINIT_FUNC
PyInit__scan(void)
{
    return PyModuleDef_Init(&definition);
}
