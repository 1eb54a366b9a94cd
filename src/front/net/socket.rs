//! What both flavours ask of a socket: listening, options, errors in our own words.
#![allow(unsafe_code)] // two socket calls that no safe crate in the tree offers

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::{CloseReason, ListenSettings};

/// A listening socket, not blocking (a listener that io_uring owns is polled all the same).
///
/// Options are set here once: Linux copies them to every accepted socket, so that a connection
/// costs no `setsockopt` calls.
pub(super) fn listen(address: SocketAddr, settings: &ListenSettings) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Frames are gathered into one send a step already; Nagle would only hold them back.
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(bytes) = settings.send_buffer_bytes {
        sockopt::set_socket_send_buffer_size(&socket, bytes as usize)?;
    }
    if let Some(bytes) = settings.receive_buffer_bytes {
        sockopt::set_socket_recv_buffer_size(&socket, bytes as usize)?;
    }
    if let Some(bytes) = settings.not_sent_lowat_bytes {
        set_not_sent_lowat(socket.as_fd(), bytes)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, settings.backlog)?;
    Ok(socket)
}

/// `TCP_NOTSENT_LOWAT`: the kernel takes no more once this much of what it has was not sent yet.
fn set_not_sent_lowat(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let value: libc::c_int = bytes.try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: no crate in the tree offers this option. The pointer and the length name `value`,
    // which lives across the call; the kernel only reads it.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that the kernel took and the peer has not acknowledged (`SIOCOUTQ`).
pub(super) fn unacknowledged_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value: libc::c_int = 0;
    // SAFETY: no crate in the tree offers this request. For TIOCOUTQ (= SIOCOUTQ) on a socket the
    // kernel writes one int through the pointer, which names `value` and is not kept.
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut value) };
    if status == 0 { Ok(value.max(0) as u32) } else { Err(io::Error::last_os_error()) }
}

/// The largest buffer that the system gives a socket by itself: the last of three numbers.
pub(super) fn system_buffer_bytes(name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    // 6 MiB is the kernel's default for the larger of the two.
    text.split_whitespace().nth(2).and_then(|last| last.parse().ok()).unwrap_or(6 << 20)
}

/// The peer's address; an error when it is gone again already.
pub(super) fn peer(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let Some(address) = rustix::net::getpeername(socket)? else {
        return Err(io::ErrorKind::NotConnected.into());
    };
    SocketAddr::try_from(address).map_err(|_| io::ErrorKind::Unsupported.into())
}

/// The address a listener is bound to, its port settled.
pub(super) fn local(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(socket)?;
    SocketAddr::try_from(address).map_err(|_| io::ErrorKind::Unsupported.into())
}

/// Makes closing the socket throw away what the kernel still holds and reset the connection.
pub(super) fn reset_on_close(socket: BorrowedFd<'_>) {
    // Fails only on a descriptor that is no socket, and then closing is all there is to do.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// Ends our direction; the peer reads the rest and then end of file.
pub(super) fn shutdown_write(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?)
}

/// What a failed operation (a positive errno) means for its connection.
pub(super) fn close_reason(errno: i32) -> CloseReason {
    match errno {
        libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED => CloseReason::PeerReset,
        other => CloseReason::Failed(other),
    }
}

/// Accepting failed for want of something that comes back by itself: try again later, not at once.
pub(super) fn is_exhaustion(errno: i32) -> bool {
    matches!(errno, libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
}

/// A wake-up descriptor: reads never block, so that a spurious wake costs nothing.
pub(super) fn new_event() -> io::Result<OwnedFd> {
    use rustix::event::EventfdFlags;
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes the descriptor readable.
pub(super) fn signal(event: BorrowedFd<'_>) {
    // Fails only when the counter is near 2^64: then it is readable already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes the descriptor unreadable until the next signal.
pub(super) fn clear(event: BorrowedFd<'_>) {
    let mut count = [0u8; 8];
    // EAGAIN means that it was clear.
    let _ = rustix::io::read(event, &mut count);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_share_of_a_connection_follows_its_settings() {
        let set = ListenSettings {
            send_buffer_bytes: Some(4096),
            receive_buffer_bytes: Some(16_384),
            ..ListenSettings::default()
        };
        assert_eq!(set.kernel_bytes_per_connection(), 2 * (4096 + 16_384));
        let free = ListenSettings::default().kernel_bytes_per_connection();
        assert_eq!(free, system_buffer_bytes("tcp_wmem") + system_buffer_bytes("tcp_rmem"));
        assert_eq!(system_buffer_bytes("no such thing"), 6 << 20);
    }
}
