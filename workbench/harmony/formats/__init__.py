"""Files of conversations that other programs write, recognized by their shape."""
