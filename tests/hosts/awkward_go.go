// awkward_go MODE [WORDS]: a Go program, whose connections are TCP's. serve: prints the port at which it serves one
// client; worker: serves one client of the listener that is its descriptor 3; say PORT: connects, and prints the server's
// letter; run PROGRAM...: runs another program, and ends as that does.
package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
)

func check(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serve(listener net.Listener) {
	connection, err := listener.Accept()
	check(err)
	_, err = connection.Write([]byte("T"))
	check(err)
	connection.Close()
}

func main() {
	switch os.Args[1] {
	case "serve":
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		check(err)
		fmt.Println(listener.Addr().(*net.TCPAddr).Port)
		serve(listener)
	case "worker":
		listener, err := net.FileListener(os.NewFile(3, "listener"))
		check(err)
		serve(listener)
	case "say":
		connection, err := net.Dial("tcp4", "localhost:"+os.Args[2]) // a name, for which a cgo program asks libc
		check(err)
		letter := []byte("-")
		_, err = connection.Read(letter)
		check(err)
		fmt.Println(string(letter))
	case "run":
		command := exec.Command(os.Args[2], os.Args[3:]...)
		command.Stdout, command.Stderr = os.Stdout, os.Stderr
		command.Run()
		os.Exit(command.ProcessState.ExitCode())
	}
}
