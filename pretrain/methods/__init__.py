"""Ways to pretrain a network, one folder each."""
