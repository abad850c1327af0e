"""Whether an answer is right, by kind of answer."""
