//! The 16550 at 0x3f8: the guest's console, into a bounded log.
//!
//! Runs on the vCPU thread that does the port access. Output is buffered by line, because every character is an
//! exit of its own. Past the limit one marker line is written and the rest dropped: the log's beginning, with
//! the boot, is worth more than its end, and a file that only grows needs no care after a crash.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker;

#[cfg(test)]
mod tests;

/// First port.
pub(crate) const BASE_PORT: u16 = 0x3f8;
/// Ports from there.
const N_PORTS: u16 = 8;
/// Longest piece of a line kept back.
const LINE_BYTES: usize = 256;
const MARKER: &[u8] = b"\n[console log is full, output dropped]\n";

/// The console's registers in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedSerial {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A bounded log.
#[derive(Debug)]
pub(crate) struct ConsoleLog {
    file: Option<File>,
    left_bytes: u64,
    marked: bool,
    line: Vec<u8>,
    dropped_bytes: u64,
}

impl ConsoleLog {
    /// Goes nowhere: before the backends are there.
    fn nowhere() -> Self {
        Self {
            file: None,
            left_bytes: 0,
            marked: true,
            line: Vec::new(),
            dropped_bytes: 0,
        }
    }

    /// Appends to `file` until that has `limit_bytes`.
    pub(crate) fn new(mut file: File, limit_bytes: u64) -> io::Result<Self> {
        let len_bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        let left_bytes = limit_bytes.saturating_sub(len_bytes);
        Ok(Self {
            file: Some(file),
            left_bytes,
            marked: left_bytes == 0,
            line: Vec::new(),
            dropped_bytes: 0,
        })
    }

    /// Writes what is kept back.
    fn write_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let len_bytes = u64::try_from(line.len()).unwrap_or(u64::MAX);
        let Some(file) = &mut self.file else { return };
        // The marker's room is reserved, so that the file never exceeds the limit.
        let marker_bytes = u64::try_from(MARKER.len()).unwrap_or(u64::MAX);
        let written = if len_bytes.saturating_add(marker_bytes) <= self.left_bytes {
            self.left_bytes -= len_bytes;
            file.write_all(&line)
        } else {
            self.dropped_bytes = self.dropped_bytes.saturating_add(len_bytes);
            let room = self.left_bytes >= marker_bytes;
            self.left_bytes = 0;
            if std::mem::replace(&mut self.marked, true) || !room {
                Ok(())
            } else {
                file.write_all(MARKER)
            }
        };
        if let Err(error) = written {
            self.dropped_bytes = self.dropped_bytes.saturating_add(len_bytes);
            tracing::debug!(%error, dropped_bytes = self.dropped_bytes, "console log lost output");
        }
        self.line = line;
        self.line.clear();
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        for &byte in data {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.write_line();
            }
        }
        Ok(data.len())
    }

    /// Does nothing: the device flushes after every byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        self.write_line();
    }
}

/// The serial line's interrupt.
#[derive(Debug)]
pub(crate) struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        worker::ring(&self.0);
        Ok(())
    }
}

type Uart = Serial<Line, NoEvents, ConsoleLog>;

/// The console.
#[derive(Debug)]
pub(crate) struct Console {
    uart: Mutex<Uart>,
    line: EventFd,
}

impl Console {
    /// A console whose output goes nowhere yet.
    pub(crate) fn new() -> io::Result<Self> {
        let line = EventFd::new(EFD_NONBLOCK)?;
        let uart = Serial::new(Line(line.try_clone()?), ConsoleLog::nowhere());
        Ok(Self {
            uart: Mutex::new(uart),
            line,
        })
    }

    /// For the irqfd.
    pub(crate) fn line(&self) -> &EventFd {
        &self.line
    }

    /// Sends output to `log` from now on.
    pub(crate) fn attach(&self, log: ConsoleLog) {
        *self.lock().writer_mut() = log;
    }

    /// A vCPU reads a port.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(offset), [byte]) = (register(port), data) {
            *byte = self.lock().read(offset);
        }
    }

    /// A vCPU writes a port.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        if let (Some(offset), &[byte]) = (register(port), data)
            && let Err(error) = self.lock().write(offset, byte)
        {
            tracing::debug!(?error, "console lost a byte");
        }
    }

    /// Writes an unfinished line to the log.
    pub(crate) fn flush(&self) {
        self.lock().writer_mut().write_line();
    }

    /// For the image.
    pub(crate) fn save(&self) -> SavedSerial {
        let state = self.lock().state();
        SavedSerial {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// From an image; `None` if the state can't be one. Pending interrupts are raised by it.
    pub(crate) fn restore(&self, saved: &SavedSerial) -> Option<()> {
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer.clone(),
        };
        let mut uart = self.lock();
        let log = std::mem::replace(uart.writer_mut(), ConsoleLog::nowhere());
        let line = Line(self.line.try_clone().ok()?);
        *uart = Serial::from_state(&state, line, NoEvents, log).ok()?;
        Some(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn register(port: u16) -> Option<u8> {
    let offset = port.checked_sub(BASE_PORT).filter(|&offset| offset < N_PORTS)?;
    u8::try_from(offset).ok()
}
