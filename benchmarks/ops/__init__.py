"""How fast is one operation, beside its peers, on the device and on the host?"""
