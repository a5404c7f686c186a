"""One file an operation: the public function, its autograd, the choice of implementation."""
