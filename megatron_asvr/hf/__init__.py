"""To and from Hugging Face: tables of names, import, export, and the proof of an export."""
