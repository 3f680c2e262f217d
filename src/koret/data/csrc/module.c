/* Passes over whole texts that Python would make piece by piece. koret.data.native chooses; the Python code next to
 * every call says what is computed, gives the same results and is what the tests compare with. Every pass is linear in
 * its input, and nothing is kept between calls. */

#include "text.h"

#define VERSION 1 /* native.py asks for this one: raise both whenever a result changes */

PyDoc_STRVAR(mark_tags_doc,
"mark_tags(text, begin, stops, decode) -> (marked, places)\n\n"
"The text from begin on with marks for tags. stops are (start, stop, replacement), the last one the end;\n"
"places says where in the marked text each of them is. decode is called with every entity.");

PyDoc_STRVAR(join_marks_doc,
"join_marks(marked, in_cell, starts, ends) -> (clean, start_item, composed, starts, ends)\n\n"
"The marked text with every run of separators joined to one. starts and ends are sorted positions in it; for each,\n"
"its place in the clean text and whether a list item opens there. composed: certainly in NFC.");

PyDoc_STRVAR(inspect_doc,
"inspect(text) -> (has_controls, has_quoted_brackets)\n\nWhether markup._CONTROL and _QUOTED_BRACKET find anything.");

PyDoc_STRVAR(find_opening_doc,
"find_opening(text, position, end) -> int\n\n"
"Where the next '<' stands after which regions._OPENING has to look, or -1: it begins one of its names or '!--'.");

PyDoc_STRVAR(squeeze_doc,
"squeeze(text) -> bytes | None\n\nUTF-8 of the text in NFC with one space for every run of white space.");

PyDoc_STRVAR(fold_doc, "fold(text) -> str | None\n\nkeys.fold_text: NFKC, lower case, no white space.");

PyDoc_STRVAR(read_lines_doc,
"read_lines(text, html) -> ([(start, end, level, header)], [line])\n\n"
"The lines that are not blank, without white space at their ends; header counts back to the line that names the\n"
"columns of its table, 0: none.");

static PyMethodDef methods[] = {
    {"mark_tags", koret_mark_tags, METH_VARARGS, mark_tags_doc},
    {"join_marks", koret_join_marks, METH_VARARGS, join_marks_doc},
    {"inspect", koret_inspect, METH_O, inspect_doc},
    {"find_opening", koret_find_opening, METH_VARARGS, find_opening_doc},
    {"squeeze", koret_squeeze, METH_O, squeeze_doc},
    {"fold", koret_fold, METH_O, fold_doc},
    {"read_lines", koret_read_lines, METH_VARARGS, read_lines_doc},
    {NULL, NULL, 0, NULL},
};

static int
start_module(PyObject *module)
{
    koret_fill_slots();
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
