"""Documents from whatever holds pictures with their text."""
