"""The quick start: a small vision-language model from nothing, on two CPU cores."""
