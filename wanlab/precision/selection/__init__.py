"""A plan chosen by measurement: costs, a mixed-integer program, proof by generations, repair."""
