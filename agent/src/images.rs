//! To be written by the platform.
