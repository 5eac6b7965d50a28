"""Which layers of which expert tolerate fewer bits, and when: predicted from few forwards, held against the truth."""
