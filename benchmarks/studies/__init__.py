"""What do the options do to training?"""
