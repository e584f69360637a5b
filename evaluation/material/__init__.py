"""What the suites for language models ask about: facts, sentences and questions of our own, and prose that ships with Python."""
