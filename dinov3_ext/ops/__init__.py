"""One module per op: public function, plain-PyTorch reference, fake, backward."""
