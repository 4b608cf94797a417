"""Which coordinates take part in a private step: rules, units, rates, and the plan that joins them."""
