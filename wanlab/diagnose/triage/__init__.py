"""Which change to make first: a decision tree as data, walked by what saved runs measured."""
