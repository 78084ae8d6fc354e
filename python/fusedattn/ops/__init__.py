"""One file per op, from its maths to its public function."""
