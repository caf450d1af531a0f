"""What should it cost: memory traffic, roofline, options and scale, on paper."""
