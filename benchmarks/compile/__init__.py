"""What does the compiler make of each kernel, without a GPU?"""
