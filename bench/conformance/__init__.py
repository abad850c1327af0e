"""What each press of kvpress keeps, beside what its counterpart here keeps."""
