// What an unmodified 64-bit kernel asks of its CPU, one step after the other.
//
// Entered in long mode with paging, flat segments and interrupts off, at any address, identity-mapped. The host's
// half is kvm.rs, which knows the addresses below and the steps' names.
//
//   port 0x10 out: step al begins       port 0x12 out: all done
//   port 0x11 out: step al went wrong   port 0x13 out: an exception nobody expected, in step al
//   port 0x14 in: 0x5a
//
// r15: step; r14: counts what handlers did; r13: expected fault address; r12: where to go on after it.

.pushsection .rodata.torpor_hostcheck_guest, "a"
.balign 16
.globl torpor_hostcheck_guest_begin
.hidden torpor_hostcheck_guest_begin
.globl torpor_hostcheck_guest_end
.hidden torpor_hostcheck_guest_end

.set GDT_PTR,    0x5800
.set IDT,        0x6000
.set IDT_PTR,    0x5810
.set STACK,      0xf000
.set USER_STACK, 0xe000
.set REMAP_PTE,  0x9000
.set REMAP_VA,   0x200000
.set PAGE_A,     0x100000
.set PAGE_B,     0x101000
.set UNMAPPED,   0x40000000
.set MMIO,       0xd0000000
.set APIC,       0xfee00000

.macro begin n
    mov r15d, \n
    mov eax, r15d
    out 0x10, al
.endm

// Goes on if the condition holds, else names the step.
.macro need cc
    j\cc 77f
    jmp fail
77:
.endm

.macro gate vector, handler, kind
    lea rax, [rip + \handler]
    mov rdi, IDT + \vector * 16
    mov [rdi], ax
    mov word ptr [rdi + 2], 0x08
    mov word ptr [rdi + 4], \kind
    shr rax, 16
    mov [rdi + 6], ax
    shr rax, 16
    mov [rdi + 8], eax
    mov dword ptr [rdi + 12], 0
.endm

.macro set_msr number, low, high
    mov ecx, \number
    mov eax, \low
    mov edx, \high
    wrmsr
.endm

// Reads the MSR into rax.
.macro get_msr number
    mov ecx, \number
    rdmsr
    shl rdx, 32
    mov eax, eax
    or rax, rdx
.endm

torpor_hostcheck_guest_begin:
    mov rsp, STACK
    begin 1             // 64-bit code
    mov rax, 0x123456789abcdef0
    bswap rax
    mov rcx, 0xf0debc9a78563412
    cmp rax, rcx
    need e
    mov dx, 0x14
    in al, dx
    cmp al, 0x5a
    need e

    begin 2             // cpuid
    xor eax, eax
    cpuid
    cmp eax, 1
    need ae
    mov eax, 0x80000001
    cpuid
    bt edx, 29
    need c
    mov eax, 1
    xor ecx, ecx
    cpuid
    mov ebp, ecx        // kept for xsetbv

    begin 3             // lgdt, far return, segment loads
    lgdt [GDT_PTR]
    push 0x08
    lea rax, [rip + 2f]
    push rax
    retfq
2:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov eax, cs
    cmp eax, 0x08
    need e

    begin 4             // ltr, lldt, str
    mov eax, 0x28
    ltr ax
    str eax
    cmp ax, 0x28
    need e
    xor eax, eax
    lldt ax

    begin 5             // lidt, int, iretq
    xor ebx, ebx
3:  mov rax, rbx
    shl rax, 4
    lea rcx, [rip + unexpected]
    lea rdi, [rax + IDT]
    mov [rdi], cx
    mov word ptr [rdi + 2], 0x08
    mov word ptr [rdi + 4], 0x8e00
    shr rcx, 16
    mov [rdi + 6], cx
    shr rcx, 16
    mov [rdi + 8], ecx
    mov dword ptr [rdi + 12], 0
    inc ebx
    cmp ebx, 256
    jne 3b
    gate 3, on_int, 0x8e00
    gate 6, on_ud, 0x8e00
    gate 14, on_pf, 0x8e00
    gate 0x30, on_timer, 0x8e00
    gate 0x40, on_int, 0x8e00
    lidt [IDT_PTR]
    xor r14d, r14d
    int 0x40
    int3
    cmp r14, 2
    need e

    begin 6             // #UD
    xor r14d, r14d
    ud2
    cmp r14, 1
    need e

    begin 7             // #PF with CR2
    xor r14d, r14d
    mov r13, UNMAPPED
    lea r12, [rip + 4f]
    mov rax, [r13]
    jmp fail
4:  cmp r14, 1
    need e

    begin 8             // EFER
    get_msr 0xc0000080
    or eax, 0x801       // SCE, NXE
    wrmsr
    get_msr 0xc0000080
    and eax, 0xd01
    cmp eax, 0xd01
    need e

    begin 9             // STAR, LSTAR, FMASK
    set_msr 0xc0000081, 0, 0x00100008
    lea rax, [rip + on_syscall]
    mov rdx, rax
    shr rdx, 32
    mov ecx, 0xc0000082
    wrmsr
    set_msr 0xc0000084, 0x47700, 0
    get_msr 0xc0000082
    lea rcx, [rip + on_syscall]
    cmp rax, rcx
    need e

    begin 10            // CR0, CR4, CR8, CR3
    mov rax, cr0
    or eax, 0x10022     // WP, NE, MP
    and eax, 0xfffffff3 // not EM, TS
    mov cr0, rax
    clts
    mov rax, cr4
    or eax, 0x680       // PGE, OSFXSR, OSXMMEXCPT
    mov cr4, rax
    mov rcx, cr4
    cmp rax, rcx
    need e
    mov rcx, rax
    and ecx, 0xffffff7f // a kernel flushes all by turning PGE off and on
    mov cr4, rcx
    mov cr4, rax
    mov eax, 7
    mov cr8, rax
    mov rcx, cr8
    cmp rcx, 7
    need e
    xor eax, eax
    mov cr8, rax
    mov rax, cr3
    mov cr3, rax

    begin 11            // x87, SSE, xsetbv
    fninit
    pxor xmm0, xmm0
    mov rax, STACK - 0x800
    fxsave [rax]
    fxrstor [rax]
    bt ebp, 26
    jnc 5f
    mov rax, cr4
    bts rax, 18         // OSXSAVE
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3
    xsetbv
    xor ecx, ecx
    xgetbv
    cmp eax, 3
    need e
5:
    begin 12            // invlpg
    mov rdi, PAGE_A
    mov dword ptr [rdi], 0xaaaaaaaa
    mov rdi, PAGE_B
    mov dword ptr [rdi], 0xbbbbbbbb
    mov rsi, REMAP_VA
    cmp dword ptr [rsi], 0xaaaaaaaa
    need e
    mov rdi, REMAP_PTE
    mov qword ptr [rdi], PAGE_B + 7
    invlpg [rsi]
    cmp dword ptr [rsi], 0xbbbbbbbb
    need e

    begin 13            // GS bases and swapgs
    set_msr 0xc0000101, 0x1000, 0
    set_msr 0xc0000102, 0x2000, 0
    swapgs
    get_msr 0xc0000101
    cmp rax, 0x2000
    need e
    swapgs
    get_msr 0xc0000101
    cmp rax, 0x1000
    need e

    begin 14            // debug registers, wbinvd, flags
    xor eax, eax
    mov dr7, rax
    mov rax, dr6
    wbinvd
    pushfq
    pop rax
    or eax, 0x200000    // ID
    push rax
    popfq
    pushfq
    pop rcx
    bt ecx, 21
    need c

    begin 15            // ring 3: iretq, syscall, sysretq, syscall
    xor r14d, r14d
    push 0x1b
    mov rax, USER_STACK
    push rax
    push 0x202
    push 0x23
    lea rax, [rip + user]
    push rax
    iretq
user:
    mov eax, cs
    cmp eax, 0x23
    jne 6f
    syscall
    syscall
6:  ud2                 // the handler of #UD would go on here, which is caught below
    hlt
on_syscall:
    swapgs
    inc r14
    cmp r14, 2
    je 7f
    swapgs
    sysretq
7:  swapgs
    mov rsp, STACK
    mov eax, cs
    cmp eax, 0x08
    need e
    mov eax, 0x10
    mov ss, eax

    begin 16            // MMIO that the VMM answers
    mov rsi, MMIO
    mov eax, [rsi]
    cmp eax, 0x12345678
    need e
    mov dword ptr [rsi + 4], 0x600d
    movzx eax, byte ptr [rsi]
    cmp eax, 0x78
    need e

    begin 17            // local APIC by MMIO
    mov rsi, APIC
    mov eax, [rsi + 0x30]
    and eax, 0xff
    cmp eax, 0x10
    need ae
    mov dword ptr [rsi + 0xf0], 0x1ff
    mov eax, [rsi + 0xf0]
    cmp eax, 0x1ff
    need e

    begin 18            // APIC timer wakes hlt
    xor r14d, r14d
    mov dword ptr [rsi + 0x3e0], 0xb
    mov dword ptr [rsi + 0x320], 0x30
    mov dword ptr [rsi + 0x380], 1000000
8:  sti
    hlt
    cli
    test r14, r14
    jz 8b

    begin 19            // rdtsc goes forward
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov rbx, rax
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    cmp rax, rbx
    need a

    mov eax, r15d
    out 0x12, al
9:  hlt
    jmp 9b

fail:
    mov eax, r15d
    out 0x11, al
2:  hlt
    jmp 2b

unexpected:
    mov eax, r15d
    out 0x13, al
2:  hlt
    jmp 2b

on_int:
    inc r14
    iretq

on_ud:
    test byte ptr [rsp + 8], 3
    jnz unexpected
    add qword ptr [rsp], 2
    inc r14
    iretq

on_pf:
    mov rax, cr2
    cmp rax, r13
    jne unexpected
    add rsp, 8
    mov [rsp], r12
    inc r14
    iretq

on_timer:
    inc r14
    mov rax, APIC
    mov dword ptr [rax + 0xb0], 0
    iretq

torpor_hostcheck_guest_end:
.popsection
