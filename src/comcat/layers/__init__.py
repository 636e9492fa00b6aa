"""What a layer is: its parts, widths, statistics, factors and costs, one file a kind."""
