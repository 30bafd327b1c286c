//! The fixed ACPI registers (PM1): enough of them to be asked for, and the one write that powers the machine off.
//!
//! The platform is not a hardware-reduced one, because Linux gives the serial port's legacy interrupt to no one
//! on those. No fixed event ever happens, so the status is always 0. Owned by the VM, used from vCPU threads.

use crate::layout::{PM1_CONTROL_PORT, PM1_EVENT_PORT};
use std::sync::atomic::{AtomicU16, Ordering};

/// `SCI_EN`: ACPI is on, and was never off.
const SCI_ENABLE: u16 = 1;
/// `SLP_EN`.
const SLEEP_ENABLE: u16 = 1 << 13;
const ENABLE_PORT: u16 = PM1_EVENT_PORT + 2;

/// The registers' only state: which events the guest enabled, because it looks whether that took.
#[derive(Debug, Default)]
pub struct Pm1 {
    enable: AtomicU16,
}

/// What a write asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pm1Write {
    /// Nothing more.
    Done,
    /// Power off.
    PowerOff,
}

impl Pm1 {
    /// Whether a port is one of these registers.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        (PM1_EVENT_PORT..PM1_CONTROL_PORT + 2).contains(&port)
    }

    /// The guest reads a register.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        let value = match port {
            ENABLE_PORT => self.enable.load(Ordering::Relaxed),
            PM1_CONTROL_PORT => SCI_ENABLE,
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// The guest writes a register.
    pub fn write(&self, port: u16, data: &[u8]) -> Pm1Write {
        let value = match *data {
            [low, high, ..] => u16::from_le_bytes([low, high]),
            _ => return Pm1Write::Done,
        };
        if port == ENABLE_PORT {
            self.enable.store(value, Ordering::Relaxed);
        }
        if port == PM1_CONTROL_PORT && value & SLEEP_ENABLE != 0 {
            Pm1Write::PowerOff
        } else {
            Pm1Write::Done
        }
    }

    /// The state for an image.
    #[must_use]
    pub fn save(&self) -> u16 {
        self.enable.load(Ordering::Relaxed)
    }

    /// The state from an image.
    pub fn restore(&self, enable: u16) {
        self.enable.store(enable, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sleep_enable_in_the_control_register_powers_off() {
        let pm1 = Pm1::default();
        assert_eq!(
            pm1.write(PM1_CONTROL_PORT, &0x1400u16.to_le_bytes()),
            Pm1Write::Done
        );
        assert_eq!(
            pm1.write(PM1_CONTROL_PORT, &0x3400u16.to_le_bytes()),
            Pm1Write::PowerOff
        );
        assert_eq!(pm1.write(PM1_CONTROL_PORT, &[0xff]), Pm1Write::Done);
        assert_eq!(pm1.write(ENABLE_PORT, &0x2020u16.to_le_bytes()), Pm1Write::Done);
        let mut data = [0; 2];
        pm1.read(ENABLE_PORT, &mut data);
        assert_eq!(u16::from_le_bytes(data), 0x2020);
    }

    #[test]
    fn acpi_reads_as_enabled_and_no_event_as_pending() {
        let pm1 = Pm1::default();
        let mut data = [0xff; 4];
        pm1.read(PM1_CONTROL_PORT, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        pm1.read(PM1_EVENT_PORT, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
