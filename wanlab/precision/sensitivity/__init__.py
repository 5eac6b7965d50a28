"""Which layers of which expert tolerate fewer bits, and when: predicted from few forwards and compared with generations."""
