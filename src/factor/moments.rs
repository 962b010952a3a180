//! Running moments that outliers cannot spoil.
