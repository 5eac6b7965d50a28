"""A plan chosen by measurement: costs, a mixed-integer program, verification by generations, repair."""
