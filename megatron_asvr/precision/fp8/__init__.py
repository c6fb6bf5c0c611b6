"""Matrix products in 8 bits: their numbers, where they apply, and a guard over them."""
