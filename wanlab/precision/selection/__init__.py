"""A plan chosen by measurement: costs, a mixed-integer programme, proof by generations, repair."""
