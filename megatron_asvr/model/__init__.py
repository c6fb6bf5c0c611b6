"""The vision-language model and its parts."""
