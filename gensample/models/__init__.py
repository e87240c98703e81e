"""Networks that gensample trains and ships."""
