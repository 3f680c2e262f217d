"""Texts to vectors, vectors to answers: encoding, lexical and dense search."""
