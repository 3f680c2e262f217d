"""From files to a prepared data set: read, clean, cut into passages, pair. No torch here."""
