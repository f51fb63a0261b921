"""The operator: turns ``TempFlowGRPOJob`` resources into pods, and pods into a truthful status."""
