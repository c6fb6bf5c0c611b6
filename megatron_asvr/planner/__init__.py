"""What a configuration will cost, by arithmetic alone: no model is built."""
