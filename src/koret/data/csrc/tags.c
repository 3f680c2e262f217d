/* Tags and entities to marks: markup._mark_tags. */

#include "text.h"

/* markup._TAG_MARKS: names of tags and the marks of their opening and closing; a heading's stands for two. */
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

/* The same by name: a hash table, filled once. */
#define SLOTS 256
static struct {
    unsigned long long number; /* the name as a number in base 37; 0: free */
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

void
koret_fill_slots(void)
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

PyObject *
koret_mark_tags(PyObject *module, PyObject *args)
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
